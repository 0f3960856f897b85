"""Samples, truncated noise and interpolation, each against its definition."""

import pytest
import torch
from torch import nn

from fastgan.models import DCGANGenerator, SAGANGenerator, SketchGenerator
from fastgan.training import class_rows, sample, standing_statistics_
from fastgan.training.sampling import interpolate, noise


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
        generator.norm.eval()  # as whoever fine-tunes with frozen statistics has it
        before = {key: value.clone() for key, value in generator.state_dict().items()}
        images = sample(generator, torch.tensor([0, 1]))
        assert [m for m in generator.modules() if not m.training] == [generator.norm]
        assert not images.requires_grad
        assert all(torch.equal(before[key], value) for key, value in generator.state_dict().items())

    def test_generates_in_batches(self, generator):
        counts = []
        generator.register_forward_hook(lambda _module, _inputs, images: counts.append(len(images)))
        sample(generator, torch.zeros(5, dtype=torch.int64), batch_size=2)
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
        with pytest.raises(ValueError, match="truncation must be positive"):
            sample(generator, torch.tensor([1]), truncation=0)
        with pytest.raises(ValueError, match="sketches must be None"):
            sample(generator, torch.tensor([1]), sketches=torch.zeros(1, 1, 16, 16))

    def test_truncated_noise_has_the_truncated_distribution(self):
        z = noise((200, 500), 0, truncation=0.5)
        assert z.abs().max() <= 0.5
        u = (torch.special.ndtr(z.double()) - torch.special.ndtr(torch.tensor(-0.5).double())) / (
            torch.special.ndtr(torch.tensor(0.5).double()) - torch.special.ndtr(torch.tensor(-0.5).double())
        )
        histogram = torch.histc(u, 10, 0, 1) / u.numel()
        torch.testing.assert_close(histogram, torch.full((10,), 0.1, dtype=u.dtype), rtol=0, atol=0.005)

    def test_an_unconditional_generator_takes_labels_as_a_count(self):
        generator = DCGANGenerator(resolution=16, image_channels=1, dim_z=4, width=8)
        assert sample(generator, torch.tensor([7, 7, 7])).shape == (3, 1, 16, 16)

    def test_sketches(self):
        generator = SketchGenerator(2, resolution=16, image_channels=1, width=8)
        labels, sketches = torch.tensor([0, 1, 1]), torch.randn(3, 1, 16, 16)
        images = sample(generator, labels, sketches=sketches, batch_size=2)
        assert not torch.equal(images[1], images[2])
        with pytest.raises(ValueError, match="sketches must be given, one for each of the 3 labels, got None"):
            sample(generator, labels)
        with pytest.raises(ValueError, match="has no noise to interpolate"):
            interpolate(generator, labels, 3)

    def test_interpolation_ends_at_the_two_vectors(self, generator):
        labels = torch.tensor([0, 2])
        rows = interpolate(generator, labels, 5, seed=3).view(2, 5, 1, 16, 16)
        ends = noise((2, 2, 8), 3)
        with torch.no_grad():
            for end, column in ((0, 0), (1, 4)):
                expected = generator.eval()(ends[end].double(), labels)
                torch.testing.assert_close(rows[:, column], expected, rtol=0, atol=1e-5)
        assert not torch.allclose(rows[:, 0], rows[:, 2])
        with pytest.raises(ValueError, match="steps must be at least 2"):
            interpolate(generator, labels, 1)


def test_standing_statistics_are_means_over_batches():
    torch.manual_seed(0)
    net = nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 3)), nn.BatchNorm1d(3), nn.Dropout()).double().train()
    net[1].eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    batches = [torch.randn(16, 4, dtype=torch.float64) for _ in range(5)]
    standing_statistics_(net, ((batch,) for batch in batches))
    assert [m.training for m in net] == [True, False, True]
    assert net[1].momentum == 0.1
    net.eval()
    inner = torch.stack([net[0](batch) for batch in batches])
    torch.testing.assert_close(net[1].running_mean, inner.mean((0, 1)))
    torch.testing.assert_close(net[1].running_var, inner.var(1).mean(0))
    changed = {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    with pytest.raises(ValueError, match="generator must have batch norm with running statistics, it has none"):
        standing_statistics_(net[0], [(batches[0],)])
    with pytest.raises(ValueError, match="inputs must have at least one batch, it has none"):
        standing_statistics_(net, [])
