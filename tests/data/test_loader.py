"""The loader: order and state, flips, noise, and the sketches it pairs images with."""

import pytest
import torch

from fastgan.data import DeviceLoader, LabeledImages, edge_map, sketches_of


def labeled(n=10, n_classes=3):
    return LabeledImages(
        torch.arange(n, dtype=torch.float32).view(n, 1, 1, 1), torch.arange(n) % n_classes, n_classes=n_classes
    )


def identities(images):
    return images.flatten().long().tolist()


class TestLoader:
    def test_an_epoch_visits_each_image_once(self):
        data = labeled(10)
        loader = DeviceLoader(data, 3)
        for _ in range(4):
            seen = [index for _ in range(3) for index in identities(loader.next()["images"])]
            assert len(set(seen)) == 9

    def test_labels_belong_to_images(self):
        batch = DeviceLoader(labeled(10), 7).next()
        assert batch["labels"].tolist() == [i % 3 for i in identities(batch["images"])]

    def test_epochs_differ_and_seeds_repeat(self):
        def order(seed, batches=4):
            loader = iter(DeviceLoader(labeled(20), 10, seed=seed))
            return [identities(next(loader)["images"]) for _ in range(batches)]

        first = order(0)
        assert first[0] + first[1] != first[2] + first[3]
        assert order(0) == first
        assert order(1) != first

    def test_independent_of_the_global_seed(self):
        torch.manual_seed(1)
        first = identities(DeviceLoader(labeled(20), 10).next()["images"])
        torch.manual_seed(2)
        assert identities(DeviceLoader(labeled(20), 10).next()["images"]) == first

    def test_state_resumes_within_an_epoch(self):
        loader = DeviceLoader(labeled(10), 3)
        for _ in range(4):
            loader.next()
        state = loader.state_dict()
        expected = [identities(loader.next()["images"]) for _ in range(7)]
        other = DeviceLoader(labeled(10), 3, seed=9)
        other.load_state_dict(state)
        assert [identities(other.next()["images"]) for _ in range(7)] == expected

    def test_bad_input(self):
        with pytest.raises(ValueError, match="batch_size must be from 1 to the number of images, 10, got 11"):
            DeviceLoader(labeled(10), 11)
        with pytest.raises(ValueError, match="state must be of a data set of 10 images, got 12"):
            DeviceLoader(labeled(10), 2).load_state_dict(DeviceLoader(labeled(12), 2).state_dict())


def numbered(n=12, n_classes=3):
    """uint8 images whose first pixel is their number, and as many unpaired sketches, numbered from 100."""
    images = torch.zeros(n, 3, 4, 4, dtype=torch.uint8)
    images[:, :, 0, 0] = torch.arange(n, dtype=torch.uint8)[:, None]
    sketches = torch.zeros(n, 1, 4, 4, dtype=torch.uint8)
    sketches[:, 0, 0, 0] = torch.arange(n, dtype=torch.uint8) + 100
    labels = torch.arange(n) % n_classes
    return LabeledImages(images, labels, n_classes, sketches=sketches, sketch_labels=labels.flip(0))


def pixel_numbers(images, column=0):
    return ((images[:, 0, 0, column] + 1) * 127.5).round().long()


def test_bytes_become_floats_and_paired_sketches_follow_their_images():
    data = numbered()
    paired = LabeledImages(data.images, data.labels, 3, sketches=data.sketches)
    batch = DeviceLoader(paired, 6, sketches="paired").next()
    assert batch["images"].dtype == torch.float32
    assert torch.equal(pixel_numbers(batch["sketches"]), pixel_numbers(batch["images"]) + 100)


def test_unpaired_sketches_are_of_the_same_class_and_all_are_used():
    data = numbered()
    loader = DeviceLoader(data, 6, sketches="unpaired")
    seen = set()
    for _ in range(30):
        batch = loader.next()
        chosen = pixel_numbers(batch["sketches"]) - 100
        assert torch.equal(data.sketch_labels[chosen], batch["labels"])
        seen.update(chosen.tolist())
    assert seen == set(range(12))


def test_flips_mirror_image_and_sketch_together():
    data = numbered()
    paired = LabeledImages(data.images, data.labels, 3, sketches=data.sketches)
    loader = DeviceLoader(paired, 12, sketches="paired", flip=True)
    kinds = set()
    for _ in range(4):
        batch = loader.next()
        for image, sketch in zip(batch["images"], batch["sketches"], strict=True):
            mirrored = bool(sketch[0, 0, 3] > -0.9)  # the number's pixel has moved to the last column
            number = pixel_numbers(image[None], 3 if mirrored else 0)
            assert number + 100 == pixel_numbers(sketch[None], 3 if mirrored else 0)
            kinds.add(mirrored)
    assert kinds == {True, False}


def test_dequantization_is_one_grey_level_wide_and_resumes():
    data = LabeledImages(torch.full((8, 1, 16, 16), 128, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64), 1)
    loader = DeviceLoader(data, 8, dequantize=True, flip=True)
    loader.next()
    state = loader.state_dict()
    noisy = loader.next()["images"] - (128 / 127.5 - 1)
    assert noisy.abs().max() <= 1 / 256 + 1e-6
    assert noisy.std() == pytest.approx(2 / 256 / 12**0.5, rel=0.05)
    other = DeviceLoader(data, 8, dequantize=True, flip=True, seed=5)
    other.load_state_dict(state)
    assert torch.equal(other.next()["images"] - (128 / 127.5 - 1), noisy)


def test_edge_map_of_a_step_and_of_a_blank_image():
    images = torch.full((2, 3, 8, 8), -1.0)
    images[0, :, :, 4:] = 1
    drawn = edge_map(images)
    assert drawn.shape == (2, 1, 8, 8)
    assert torch.equal(drawn[0, 0, :, 3:5], torch.full((8, 2), -1.0))
    assert torch.equal(drawn[0, 0, :, [0, 1, 2, 5, 6, 7]], torch.ones(8, 6))
    assert torch.equal(drawn[1], torch.ones(1, 8, 8))


def test_sketches_of_a_set():
    data = numbered()
    assert torch.equal(sketches_of(data, "edges"), edge_map(data.images.float() / 127.5 - 1))
    chosen = pixel_numbers(sketches_of(data, "unpaired")) - 100
    assert torch.equal(data.sketch_labels[chosen], data.labels)
    assert len(set(chosen.tolist())) == 12


def test_sketches_that_the_data_has_not():
    with pytest.raises(ValueError, match="sketches must be one of 'none', 'edges', 'paired', 'unpaired', got 'lines'"):
        DeviceLoader(labeled(), 2, sketches="lines")
    with pytest.raises(ValueError, match="'paired' needs data with a sketch for each image"):
        DeviceLoader(numbered(), 2, sketches="paired")
    with pytest.raises(ValueError, match="'unpaired' needs data with sketches and their labels"):
        DeviceLoader(labeled(), 2, sketches="unpaired")


@pytest.mark.parametrize("sketches", ["none", "edges", "paired", "unpaired"])
def test_parts_of_batches_are_the_whole_ones(sketches):
    """Three loaders over epochs of 14 images in batches of 6, each with its own choice of flips, noise and sketches."""
    rng = torch.Generator().manual_seed(0)
    images, drawn = torch.rand(14, 1, 8, 8, generator=rng) * 2 - 1, torch.rand(14, 1, 8, 8, generator=rng)
    labels = torch.arange(14) % 2
    data = LabeledImages(images, labels, 2, sketches=drawn, sketch_labels=labels if sketches == "unpaired" else None)
    options = {"flip": True, "dequantize": True, "sketches": sketches}
    whole = DeviceLoader(data, 6, **options)
    parts = [DeviceLoader(data, 6, rank=rank, parts=3, **options) for rank in range(3)]
    for _ in range(5):
        batch, shares = whole.next(), [part.next() for part in parts]
        for name, value in batch.items():
            assert torch.equal(torch.cat([share[name] for share in shares]), value), name
    assert all(torch.equal(part.state_dict()["rng"], whole.state_dict()["rng"]) for part in parts)
    with pytest.raises(ValueError, match="batch_size must be divisible by the number of processes, 4, got 6"):
        DeviceLoader(data, 6, parts=4)
    for rank, parts in ((3, 3), (0, 0)):
        with pytest.raises(ValueError, match=f"rank must be at least 0 and less than parts, got {rank} and {parts}"):
            DeviceLoader(data, 6, rank=rank, parts=parts)
