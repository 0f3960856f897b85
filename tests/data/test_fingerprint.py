"""Fingerprints of files: what they depend on, and how a difference is described."""

import zlib

from fastgan.data.fingerprint import changes, fingerprint_files


def test_paths_and_contents_decide(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"abc" * 1_000_000)  # more than a chunk
    (tmp_path / "y").write_bytes(b"")
    found = fingerprint_files(tmp_path, [tmp_path / "a" / "x", tmp_path / "y"])
    assert found == {"a/x": f"{zlib.crc32(b'abc' * 1_000_000):08x}", "y": "00000000"}


def test_changes_are_named():
    before = {name: "1" for name in "abcdef"}
    assert changes(before, before) == ""
    assert changes(before, {**before, "a": "2", "z": "1"}) == "1 file is new: z; 1 file is changed: a"
    assert changes(before, {"f": "1"}) == "5 files are gone: a, b, c, ..."
