"""Crops of photographs: where they come from, and that the two parts stay apart."""

import pytest
import torch

from fastgan._checks import InputError
from fastgan.data import load_data, photos
from fastgan.data.photographs import BAND, PHOTOS, _bands, _read

pytest.importorskip("skimage")
pytest.importorskip("sklearn")


def occurs(crop, picture):
    """Yield each row of ``picture`` (H, W, 3) at which ``crop`` (3, h, w) lies."""
    target, picture = crop.permute(1, 2, 0), torch.from_numpy(picture)
    height, width = target.shape[:2]
    windows = picture[: len(picture) - height + 1, : picture.shape[1] - width + 1]
    for top, left in torch.nonzero((windows == target[0, 0]).all(-1)).tolist():
        if torch.equal(picture[top : top + height, left : left + width], target):
            yield top


def test_crops_lie_in_their_photograph_and_in_bands_of_their_own():
    train, test = photos(24, 40, 40, seed=3)
    files = list(PHOTOS.values())
    for part, is_test in ((train, False), (test, True)):
        assert part.images.shape == (40, 3, 24, 24)
        assert part.labels.bincount().tolist() == [4] * 10
        for crop, label in zip(part.images[:20], part.labels[:20].tolist(), strict=True):
            places = [(top, view) for file in files[label] for view in [_read(file)] for top in occurs(crop, view)]
            assert any(
                first <= top and top + 24 <= end for top, view in places for first, end in _bands(len(view), is_test)
            )


@pytest.mark.parametrize("height", [300, 427, 512, 1411])
def test_bands_cover_a_photograph_once(height):
    rows = [set(range(*band)) for is_test in (False, True) for band in _bands(height, is_test)]
    assert sorted(row for band in rows for row in band) == list(range(height))
    assert min(map(len, rows)) >= BAND
    assert _bands(height, True)


def test_seeds_numbers_and_errors():
    first, again, other = (photos(16, 20, 10, seed=s)[0].images for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert photos(96, 10, 10)[1].images.shape == (10, 3, 96, 96)
    for arguments, match in (((128,), "resolution must be from 1 to 96"), ((32, 9), "n_train must be at least 10")):
        with pytest.raises(ValueError, match=match):
            photos(*arguments)


def test_photos_by_name(monkeypatch):
    split = load_data("photos:30", 16)
    assert (len(split.train), len(split.held_out)) == (30, 10_000)
    assert split.found.startswith("10030 images 16x16 RGB, 10 classes: astronaut 1003, chelsea 1003")
    with pytest.raises(InputError, match="photos are in color"):
        load_data("photos", 16, channels=1)
    with pytest.raises(InputError, match="n_train must be at least 10"):
        load_data("photos:3", 16)
    with pytest.raises(InputError, match="data must be one of"):
        load_data("photos:many", 16)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install 'fastgan.photos.'"):
        load_data("photos:30", 16)
