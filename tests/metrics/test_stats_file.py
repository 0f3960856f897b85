"""npz files: round trips, other tools' files, damage, atomicity."""

import weakref

import numpy as np
import pytest
import torch

import fastgan
from fastgan.metrics import FeatureStats, InputError, frechet_distance
from fastgan.metrics.evaluate import merge_files

ROWS = torch.randn(6, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def some_stats(n=6):
    stats = FeatureStats(backbone="inception", resize="clean", precision="bf16")
    return stats.update(ROWS.repeat(5, 1)[:n].float() + torch.arange(n)[:, None])


@pytest.mark.parametrize("n", [2, 6, 9, 10, 30])
def test_round_trip(tmp_path, n):
    stats = some_stats(n)
    stats.save(tmp_path / "stats.npz")
    loaded = FeatureStats.load(tmp_path / "stats.npz")
    for name in ("n", "dim", "backbone", "resize", "precision", "dtype"):
        assert getattr(loaded, name) == getattr(stats, name)
    scale = stats.cov.abs().max()
    assert (loaded.mean - stats.mean).abs().max() <= 1e-15 * stats.mean.abs().max()
    assert (loaded.cov - stats.cov).abs().max() <= 1e-14 * scale
    assert (loaded.factor is None) == (stats.factor is None) == (n > 9)
    more = ROWS[:4] * 3
    assert (loaded.update(more).cov - stats.update(more).cov).abs().max() <= 1e-14 * scale


def test_the_file_has_the_documented_keys(tmp_path):
    stats = some_stats()
    stats.save(tmp_path / "stats.npz")
    with np.load(tmp_path / "stats.npz", allow_pickle=False) as file:
        assert set(file.files) == {
            "mu",
            "sigma",
            "n",
            "factor",
            "backbone",
            "resize",
            "precision",
            "dtype",
            "fastgan_version",
        }
        assert file["mu"].dtype == file["sigma"].dtype == np.float64
        np.testing.assert_array_equal(file["mu"], stats.mean.numpy())
        np.testing.assert_array_equal(file["sigma"], stats.cov.numpy())
        assert str(file["fastgan_version"]) == fastgan.__version__
        assert str(file["dtype"]) == "float32"
    assert [path.name for path in tmp_path.iterdir()] == ["stats.npz"]


@pytest.mark.parametrize("n", [6, 30])
def test_the_root_is_written_if_asked_for(tmp_path, n):
    stats = some_stats(n)
    stats.root()
    stats.save(tmp_path / "without.npz")
    stats.save(tmp_path / "with.npz", root=True)
    with np.load(tmp_path / "without.npz") as without, np.load(tmp_path / "with.npz") as file:
        assert set(file.files) - set(without.files) == ({"root"} if n > 9 else set())
        np.testing.assert_array_equal(file["sigma"], without["sigma"])
    assert (FeatureStats.load(tmp_path / "without.npz").known_root is None) == (n > 9)
    root = FeatureStats.load(tmp_path / "with.npz").known_root
    torch.testing.assert_close(root.mT @ root, stats.cov, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keys", [("mu", "sigma"), ("mu_s", "sigma_s")])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_files_of_other_tools(tmp_path, keys, dtype):
    rows = np.random.default_rng(0).standard_normal((50, 5))
    mu, sigma = rows.mean(axis=0).astype(dtype), np.cov(rows, rowvar=False).astype(dtype)
    np.savez(tmp_path / "other.npz", **{keys[0]: mu, keys[1]: sigma})
    stats = FeatureStats.load(tmp_path / "other.npz")
    assert (stats.n, stats.dim, stats.backbone, stats.factor) == (None, 5, None, None)
    # np.cov is symmetric to rounding alone, with some BLAS
    np.testing.assert_allclose(stats.cov.numpy(), sigma.astype(np.float64), rtol=4 * np.finfo(dtype).eps)
    assert 0 <= frechet_distance(stats, (mu, sigma)) < 1e-13 * np.trace(sigma)
    stats.save(tmp_path / "again.npz")
    assert FeatureStats.load(tmp_path / "again.npz").n is None


MU, SIGMA = np.zeros(3), np.eye(3)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": MU}, r"must hold mu and sigma .* it has: mu"),
        ({}, "it has: nothing"),
        ({"mu": MU, "sigma": np.eye(4)}, r"cov must have shape \(3, 3\)"),
        ({"mu": MU, "sigma": np.full((3, 3), np.nan)}, "cov must be finite"),
        ({"mu": MU, "sigma": SIGMA, "n": np.array(1)}, "n must be an integer of at least 2"),
        ({"mu": MU, "sigma": SIGMA, "n": np.array(2.5)}, "n must be one integer"),
        ({"mu": MU, "sigma": SIGMA, "n": np.array([3, 4])}, "n must be one integer"),
        ({"mu": MU, "sigma": SIGMA, "backbone": np.array(3)}, "backbone must be one string"),
        ({"mu": MU, "sigma": SIGMA, "n": np.array(3), "factor": np.eye(2)}, "factor must have shape"),
        ({"mu": MU, "sigma": SIGMA, "n": np.array(3), "factor": np.eye(3)}, "factor must be the centered vectors"),
        ({"mu": MU, "sigma": SIGMA, "n": np.array(3), "factor": np.full((3, 3), np.inf)}, "factor must be finite"),
        ({"mu": MU, "sigma": SIGMA, "root": np.eye(4)}, r"root must have shape \(r, dim\) with r <= dim = 3"),
        ({"mu": MU, "sigma": SIGMA, "root": np.full((3, 3), np.nan)}, "root must be finite"),
        ({"mu": MU, "sigma": SIGMA, "root": np.diag([1, 1, 2.0])}, r"root must have root\^T root = cov: they differ"),
        (
            {"mu": np.array(["a", "b", "c"]), "sigma": SIGMA},
            "must be a tensor or an array of numbers",
        ),
        ({"mu": np.array([None] * 3), "sigma": SIGMA}, "pickled objects, which are never loaded"),
    ],
)
def test_unusable_files(tmp_path, arrays, message):
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(InputError, match=message) as error:
        FeatureStats.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("keep", [0, 10, 200, -30])
def test_a_truncated_file(tmp_path, keep):
    some_stats(30).save(tmp_path / "stats.npz")
    whole = (tmp_path / "stats.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:keep])
    with pytest.raises(InputError, match=r"cut\.npz"):
        FeatureStats.load(tmp_path / "cut.npz")


def test_a_flipped_byte_is_noticed(tmp_path):
    some_stats(30).save(tmp_path / "stats.npz")
    damaged = bytearray((tmp_path / "stats.npz").read_bytes())
    damaged[200] ^= 255  # among the values of mu
    (tmp_path / "stats.npz").write_bytes(damaged)
    with pytest.raises(InputError, match=r"stats\.npz"):
        FeatureStats.load(tmp_path / "stats.npz")


def test_no_file_no_npz_and_a_pickle(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        FeatureStats.load(tmp_path / "none.npz")
    np.save(tmp_path / "array.npy", MU)
    with pytest.raises(InputError, match="not an npz file"):
        FeatureStats.load(tmp_path / "array.npy")
    np.save(tmp_path / "pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="not an npz file"):
        FeatureStats.load(tmp_path / "pickle.npy")
    (tmp_path / "junk.npz").write_bytes(b"junk that is no archive")
    with pytest.raises(InputError, match="junk.npz is not an npz file"):
        FeatureStats.load(tmp_path / "junk.npz")
    with pytest.raises(InputError, match="is a folder, not an npz file"):
        FeatureStats.load(tmp_path)


def test_nothing_is_written_if_saving_fails(tmp_path, monkeypatch):
    path = tmp_path / "stats.npz"
    path.write_text("precious")
    with pytest.raises(InputError, match="at least 2 feature vectors"):
        FeatureStats().update(ROWS[:1]).save(path)

    def full_disk(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(InputError, match="No space left on device"):
        some_stats().save(path)
    assert path.read_text() == "precious"
    assert [p.name for p in tmp_path.iterdir()] == ["stats.npz"]


def test_saving_into_no_folder(tmp_path):
    with pytest.raises(InputError, match="cannot write"):
        some_stats().save(tmp_path / "none" / "stats.npz")


PLAIN_ROWS = np.random.default_rng(1).standard_normal((60, 4))
PLAIN = {"mu": PLAIN_ROWS.mean(0), "sigma": np.cov(PLAIN_ROWS, rowvar=False)}


@pytest.mark.parametrize(
    ("arrays", "tolerance"),
    [
        ({"MU": PLAIN["mu"], "Sigma": PLAIN["sigma"]}, 1e-12),
        ({"mu_s": PLAIN["mu"], "sigma": PLAIN["sigma"]}, 1e-12),
        ({"mu": PLAIN["mu"][None], "sigma": PLAIN["sigma"][None]}, 1e-12),
        ({"mu": PLAIN["mu"][:, None], "sigma": PLAIN["sigma"]}, 1e-12),
        ({"mu": PLAIN["mu"].astype(">f8"), "sigma": PLAIN["sigma"].astype(">f8")[::-1, ::-1][::-1, ::-1]}, 1e-12),
        ({"mu": PLAIN["mu"].astype(np.float16), "sigma": PLAIN["sigma"].astype(np.float16)}, 2e-3),
        ({"mu": PLAIN["mu"], "sigma": PLAIN["sigma"] + np.triu(np.full((4, 4), 1e-6))}, 2e-6),
    ],
)
def test_statistics_in_the_shapes_and_dtypes_of_others(tmp_path, arrays, tolerance):
    np.savez(tmp_path / "stats.npz", **arrays)
    stats = FeatureStats.load(tmp_path / "stats.npz")
    torch.testing.assert_close(stats.mean, torch.from_numpy(PLAIN["mu"]), rtol=0, atol=tolerance)
    torch.testing.assert_close(stats.cov, torch.from_numpy(PLAIN["sigma"]), rtol=0, atol=tolerance)


def test_statistics_of_one_feature(tmp_path):
    np.savez(tmp_path / "stats.npz", mu=np.float64(2), sigma=np.float64(3))
    stats = FeatureStats.load(tmp_path / "stats.npz")
    assert (stats.mean.tolist(), stats.cov.tolist()) == ([2], [[3]])


def test_a_thousand_files_are_merged_in_constant_memory(tmp_path, monkeypatch):
    """One is held at a time beside the sum, and the result is that of all vectors together."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((5000, 16)) + 3
    for i, part in enumerate(np.array_split(rows, 1000)):
        FeatureStats(16).update(part).save(tmp_path / f"{i:04}.npz")
    load, alive, most = FeatureStats.load, weakref.WeakSet(), []

    def counted(path):
        stats = load(path)
        alive.add(stats)
        most.append(len(alive))
        return stats

    monkeypatch.setattr(FeatureStats, "load", counted)
    merged = merge_files(sorted(tmp_path.glob("*.npz")))
    assert (len(most), max(most)) == (1000, 2)  # the one before is there until the next is read
    assert merged.n == 5000
    np.testing.assert_allclose(merged.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(merged.cov, np.cov(rows.T), rtol=1e-11, atol=1e-12)
