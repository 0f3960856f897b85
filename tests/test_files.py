import errno

import pytest

from fastgan._files import atomic_path, write_bytes, write_text


def test_writes_into_a_new_folder_and_overwrites(tmp_path):
    path = tmp_path / "a" / "b.txt"
    write_text(path, "one")
    write_bytes(path, b"two")
    assert path.read_text() == "two"
    assert [p.name for p in path.parent.iterdir()] == ["b.txt"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "b.txt"
    write_text(path, "old")

    def interrupted():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        interrupted()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["b.txt"]


def test_an_error_without_a_file_gets_the_name(tmp_path):
    path = tmp_path / "b.txt"
    with pytest.raises(OSError, match="No space left") as raised, atomic_path(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert raised.value.filename == str(path)
