"""Checkpoints that a truncated file, a crash and a full disk cannot take away."""

import resource

import pytest
import torch

from fastgan._checks import InputError
from fastgan.training.checkpoint import Checkpoints, DiskFullError, read_checkpoint


def state(step, size=10):
    return {"trainer": {"step": step, "weights": torch.full((size,), float(step))}, "scores": []}


def step_of(checkpoints, notes=None):
    return checkpoints.load(([] if notes is None else notes).append)["trainer"]["step"]


def test_the_last_and_the_one_before_it_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new")
    for step in (1, 2, 3):
        checkpoints.save(state(step))
    checkpoints.save_best(state(2))
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["best.pt", "last.pt", "previous.pt"]
    assert step_of(checkpoints) == 3
    assert read_checkpoint(tmp_path / "new" / "previous.pt")["trainer"]["step"] == 2


@pytest.mark.parametrize("part", [0, 0.5, 0.99])
def test_a_truncated_checkpoint_falls_back_to_the_previous_one_and_says_so(tmp_path, part):
    checkpoints, notes = Checkpoints(tmp_path), []
    for step in (1, 2):
        checkpoints.save(state(step, size=1000))
    whole = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[: int(part * len(whole))])
    assert step_of(checkpoints, notes) == 1
    assert len(notes) == 1
    assert f"{tmp_path / 'last.pt'} is damaged" in notes[0]
    assert f"going on from {tmp_path / 'previous.pt'}, step 1" in notes[0]


def test_nothing_to_go_on_from(tmp_path):
    with pytest.raises(InputError, match="no checkpoint to go on from: .*last.pt does not exist; .*previous.pt"):
        step_of(Checkpoints(tmp_path))
    (tmp_path / "last.pt").write_bytes(b"junk")
    with pytest.raises(InputError, match="last.pt is damaged"):
        step_of(Checkpoints(tmp_path))


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"trainer": {"step": 1, "x": Evil()}}, tmp_path / "last.pt")
    with pytest.raises(InputError, match="is damaged"):
        step_of(Checkpoints(tmp_path))


@pytest.fixture
def small_disk():
    """Files may grow to 20 kB; the kernel refuses the rest, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_disk")
def test_a_full_disk_leaves_the_checkpoints_as_they_were(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(state(step))
    for save in (checkpoints.save, checkpoints.save_best):
        with pytest.raises(DiskFullError, match="no room for"):
            save(state(3, size=100_000))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "previous.pt"]
    assert step_of(checkpoints) == 2
