"""Moving average, augmentation and sampling, each against its definition."""

import pytest
import torch
from torch import nn

from fastgan.models import SAGANGenerator
from fastgan.nn import group_spectral_norm
from fastgan.training import EMA, class_rows, sample
from fastgan.training.augment import augment, translate


class TestEMA:
    def test_follows_its_formula(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
        ema = EMA(model, decay=0.5)
        expected = {key: value.clone() for key, value in model.state_dict().items()}
        for t in range(12):
            with torch.no_grad():
                for tensor in (*model.parameters(), model[1].running_mean, model[1].running_var):
                    tensor.normal_()
            ema.update(model)
            decay = min(0.5, (1 + t) / (10 + t))
            for key, value in model.state_dict().items():
                if value.is_floating_point():
                    expected[key] = decay * expected[key] + (1 - decay) * value
        for key, value in ema.module.state_dict().items():
            torch.testing.assert_close(value, expected[key], rtol=1e-12, atol=1e-12)

    def test_spectral_norm_vectors_are_copied(self):
        model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
        group_spectral_norm(model)
        ema = EMA(model, decay=0.9)
        for _ in range(3):
            model(torch.randn(2, 4))
            ema.update(model)
        for key, value in model.state_dict().items():
            if key.endswith(("_u", "_v")):
                assert torch.equal(ema.module.state_dict()[key], value)

    def test_is_apart_from_the_model(self):
        model = nn.Linear(2, 2)
        ema = EMA(model, decay=0.9)
        before = model.weight.detach().clone()
        with torch.no_grad():
            ema.module.weight.zero_()
        assert torch.equal(model.weight, before)
        assert not ema.module.training
        assert not any(p.requires_grad for p in ema.module.parameters())

    def test_bad_decay(self):
        with pytest.raises(ValueError, match=r"decay must be in \[0, 1\)"):
            EMA(nn.Linear(2, 2), decay=1)


class TestTranslate:
    def test_shifts_whole_images_and_fills_in_black(self):
        images = torch.rand(64, 2, 8, 12)
        moved = translate(images, torch.Generator().manual_seed(0), ratio=0.25)
        assert moved.shape == images.shape
        seen = set()
        for image, result in zip(images, moved, strict=True):
            padded = nn.functional.pad(image, (3, 3, 2, 2), value=-1.0)
            matches = [
                (dy, dx)
                for dy in range(5)
                for dx in range(7)
                if torch.equal(padded[:, dy : dy + 8, dx : dx + 12], result)
            ]
            assert len(matches) == 1
            seen.update(matches)
        assert len(seen) > 20

    def test_gradient_goes_to_the_pixels_that_stay(self):
        images = torch.rand(4, 1, 8, 8, requires_grad=True)
        moved = translate(images, torch.Generator().manual_seed(0))
        moved.sum().backward()
        assert images.grad.sum() == (moved > -1).sum()
        assert set(images.grad.unique().tolist()) <= {0.0, 1.0}

    def test_seed(self):
        images = torch.rand(16, 1, 8, 8)
        first, second, other = (translate(images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
        assert torch.equal(first, second)
        assert not torch.equal(first, other)

    def test_policy(self):
        rng, images = torch.Generator(), torch.rand(2, 1, 8, 8)
        assert augment(images, (), rng) is images
        expected = translate(images, torch.Generator().manual_seed(1))
        assert torch.equal(augment(images, ["translation"], rng.manual_seed(1)), expected)
        with pytest.raises(ValueError, match="augment must be names out of"):
            augment(images, ["colour"], rng)
        with pytest.raises(ValueError, match="images must have 4 dimensions"):
            augment(images[0], (), rng)


class TestSample:
    @pytest.fixture
    def generator(self):
        return SAGANGenerator(3, resolution=16, image_channels=1, dim_z=8, width=8, attention_resolution=8).double()

    def test_same_images_for_every_batch_size(self, generator):
        labels = torch.tensor([0, 2, 1, 1, 0])
        whole = sample(generator, labels, seed=3)
        assert whole.shape == (5, 1, 16, 16)
        torch.testing.assert_close(sample(generator, labels, seed=3, batch_size=2), whole, rtol=1e-10, atol=1e-10)
        assert not torch.allclose(sample(generator, labels, seed=4), whole)

    def test_leaves_the_generator_as_it_was(self, generator):
        generator.train()
        before = {key: value.clone() for key, value in generator.state_dict().items()}
        images = sample(generator, torch.tensor([0, 1]))
        assert generator.training
        assert not images.requires_grad
        assert all(torch.equal(before[key], value) for key, value in generator.state_dict().items())

    def test_tells_of_its_batches(self, generator):
        counts = []
        sample(generator, torch.zeros(5, dtype=torch.int64), batch_size=2, on_batch=counts.append)
        assert counts == [2, 2, 1]

    def test_class_rows(self):
        assert class_rows(3, 2).tolist() == [0, 0, 1, 1, 2, 2]

    def test_bad_input(self, generator):
        with pytest.raises(ValueError, match=r"labels must be in \[0, 3\), got 1 to 3"):
            sample(generator, torch.tensor([1, 3]))
        with pytest.raises(ValueError, match="labels must hold at least one"):
            sample(generator, torch.zeros(0, dtype=torch.int64))
        with pytest.raises(ValueError, match="labels must have dtype int64"):
            sample(generator, torch.zeros(2))
        with pytest.raises(ValueError, match="batch_size must be at least 1"):
            sample(generator, torch.tensor([1]), batch_size=0)
