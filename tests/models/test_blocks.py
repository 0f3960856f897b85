"""Blocks against plain compositions of torch's own layers, in float64."""

import pytest
import torch
from torch.nn import functional as F

from fastgan.models.blocks import (
    ConditionalBatchNorm2d,
    DownBlock,
    ProjectionHead,
    UpBlock,
    init_weights,
    join_one_hot,
    make_head,
)

LABELS = torch.tensor([2, 0, 2, 1, 0])


def exact(module):
    """In float64, with weights that are not at their neutral initial values."""
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


class TestConditionalBatchNorm:
    @pytest.mark.parametrize("training", [True, False])
    def test_each_class_is_an_affine_batch_norm(self, training):
        norm = exact(ConditionalBatchNorm2d(4, n_classes=3)).train(training)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        x = torch.randn(5, 4, 6, 5, dtype=torch.float64)
        mean, var = norm.running_mean.clone(), norm.running_var.clone()
        y = norm(x, LABELS)
        for label in range(3):
            expected = F.batch_norm(
                x, mean.clone(), var.clone(), norm.gain[label], norm.shift[label], training=training, eps=norm.eps
            )
            torch.testing.assert_close(y[label == LABELS], expected[label == LABELS], rtol=1e-12, atol=1e-12)

    def test_starts_as_plain_batch_norm(self):
        x = torch.randn(5, 4, 3, 3)
        torch.testing.assert_close(ConditionalBatchNorm2d(4, 3)(x, LABELS), torch.nn.BatchNorm2d(4)(x))

    def test_only_rows_of_present_classes_get_gradients(self):
        norm = ConditionalBatchNorm2d(4, n_classes=5)
        norm(torch.randn(5, 4, 3, 3), LABELS).square().sum().backward()
        assert (norm.gain.grad != 0).any(1).tolist() == [True, True, True, False, False]

    def test_tables_are_not_seen_by_spectral_norm(self):
        assert not any(isinstance(m, torch.nn.Embedding) for m in ConditionalBatchNorm2d(4, 3).modules())


def test_up_block_equals_its_formula():
    block = exact(UpBlock(4, 6, n_classes=3))
    x = torch.randn(5, 4, 3, 3, dtype=torch.float64)

    def double(t):
        return t.repeat_interleave(2, 2).repeat_interleave(2, 3)

    h = block.conv1(double(F.relu(block.norm1(x, LABELS))))
    expected = block.conv2(F.relu(block.norm2(h, LABELS))) + block.skip(double(x))
    torch.testing.assert_close(block(x, LABELS), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("downsample", "first"), [(True, True), (True, False), (False, False)])
def test_down_block_equals_its_formula(downsample, first):
    block = exact(DownBlock(4, 6, downsample=downsample, first=first))
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    h = block.conv2(F.relu(block.conv1(x if first else F.relu(x)))) + block.skip(x)
    expected = F.avg_pool2d(h, 2) if downsample else h
    torch.testing.assert_close(block(x), expected, rtol=1e-11, atol=1e-11)


def test_projection_head():
    head = exact(ProjectionHead(7, n_classes=3))
    h = torch.randn(5, 7, dtype=torch.float64)
    expected = [
        (head.linear.weight[0] @ h[i] + head.linear.bias[0] + head.embed.weight[label] @ h[i]).item()
        for i, label in enumerate(LABELS)
    ]
    torch.testing.assert_close(head(h, LABELS), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_initial_weights_are_orthogonal():
    block = DownBlock(8, 16)
    init_weights(block)
    for conv in (block.conv1, block.conv2, block.skip):
        values = torch.linalg.svdvals(conv.weight.flatten(1))
        torch.testing.assert_close(values, torch.ones_like(values), rtol=0, atol=1e-5)
        assert not conv.bias.any()


def test_unconditional_block_ignores_labels():
    block = UpBlock(4, 4, 0).double()
    x = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    assert torch.equal(block.eval()(x, LABELS), block(x, None))


def test_auxiliary_head_gives_both_logits():
    head, h = make_head("auxiliary", 6, 3), torch.randn(5, 6)
    logits, classes = head(h, LABELS)
    torch.testing.assert_close(logits, h @ head.linear.weight[0] + head.linear.bias)
    torch.testing.assert_close(classes, h @ head.classes.weight.T + head.classes.bias)
    with pytest.raises(ValueError, match="head must be one of 'plain', 'projection', 'auxiliary', got 'x'"):
        make_head("x", 6, 3)


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3, 2)])
def test_join_one_hot(shape):
    h = torch.randn(shape)
    joined = join_one_hot(h, LABELS, 3)
    code = F.one_hot(LABELS, 3).float().view(5, 3, *(1,) * (h.ndim - 2)).expand(5, 3, *shape[2:])
    assert torch.equal(joined, torch.cat([h, code], 1))
