"""Other people's transformers within ``second_order_attention`` against torch's MATH backend."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgan.losses.penalties import gradient_penalty, r1_penalty
from fastgan.nn import second_order_attention
from fastgan.nn.second_order import SecondOrderAttention
from fastgan.ops import _attention as attention_ops
from tests.accuracy import assert_as_accurate
from tests.peak_bytes import PeakBytes


@pytest.fixture(autouse=True)
def no_map_is_small(monkeypatch):
    monkeypatch.setattr(attention_ops, "SMALL_MAPS", 0)


def timm_vit():
    timm = pytest.importorskip("timm")
    return timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, depth=2, num_classes=1)


class HuggingFaceViT(nn.Module):
    """A critic of images (n, 3, 16, 16) made of transformers' ViT."""

    def __init__(self):
        transformers = pytest.importorskip("transformers")
        super().__init__()
        config = transformers.ViTConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            image_size=16,
            patch_size=4,
            num_labels=1,
            attn_implementation="sdpa",
        )
        self.network = transformers.ViTForImageClassification(config)
        nn.init.normal_(self.network.classifier.weight)  # its own is so small that penalties would be rounding alone

    def forward(self, x):
        return self.network(pixel_values=x).logits.squeeze(1)


class HuggingFaceLlama(nn.Module):
    """A critic of images (n, 3, 16, 16), their pixels 24 to a token: causal, grouped queries, and masks that hide the
    last tokens of one of them."""

    def __init__(self):
        transformers = pytest.importorskip("transformers")
        super().__init__()
        config = transformers.LlamaConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=32,
            vocab_size=8,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            attn_implementation="sdpa",
        )
        self.network = transformers.LlamaModel(config)
        self.score = nn.Linear(24, 1)

    def forward(self, x):
        seen = torch.ones(len(x), 32, dtype=torch.long)
        seen[0, 20:] = 0
        hidden = self.network(inputs_embeds=x.flatten(1).unflatten(1, (32, 24)), attention_mask=seen).last_hidden_state
        return self.score((hidden * seen[..., None]).square()).sum((1, 2))


class Encoder(nn.Module):
    """A critic of images (n, 3, 16, 16), their pixels 8 to a token."""

    def __init__(self, mask=None):
        super().__init__()
        layer = nn.TransformerEncoderLayer(24, 3, 32, dropout=0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.mask = mask
        self.score = nn.Linear(24, 1)

    def forward(self, x):
        return self.score(self.encoder(x.flatten(1).unflatten(1, (32, 24)), mask=self.mask).square()).sum(1)


CRITICS = {
    "timm": timm_vit,
    "transformers ViT": HuggingFaceViT,
    "transformers Llama": HuggingFaceLlama,
    "encoder": Encoder,
    "causal encoder": lambda: Encoder(nn.Transformer.generate_square_subsequent_mask(32)),
}
PENALTIES = {
    "r1": lambda critic, x: r1_penalty(critic, x),
    "wgan-gp": lambda critic, x: gradient_penalty(critic, x, x.flip(0), x.new_full((len(x), 1, 1, 1), 0.3)),
}


def penalty_and_gradients(critic, penalty, x, context):
    weights = list(critic.parameters())
    with context:
        value = penalty(critic, x)
    gradients = torch.autograd.grad(value, weights, allow_unused=True)
    return [value, *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
@pytest.mark.parametrize("make", CRITICS.values(), ids=CRITICS)
def test_penalties_equal_those_of_the_math_backend(make, penalty, is_training):
    critic, x = make().train(is_training), torch.randn(3, 3, 16, 16)
    exact_critic = copy.deepcopy(critic).double()
    if isinstance(critic, Encoder) and critic.mask is not None:
        exact_critic.mask = critic.mask.double()
    truth = penalty_and_gradients(exact_critic, penalty, x.double(), sdpa_kernel(SDPBackend.MATH))
    plain = penalty_and_gradients(critic, penalty, x, sdpa_kernel(SDPBackend.MATH))
    actual = penalty_and_gradients(critic, penalty, x, second_order_attention())
    floor = 1e-4 * max(t.norm() for t in truth[1:])  # gradients that cancel, as the key's bias, are rounding alone
    for a, p, t in zip(actual, plain, truth, strict=True):
        if t.norm() > floor:
            assert_as_accurate(a, p, t)
        else:
            assert a.norm() <= floor


@pytest.mark.parametrize("make", [timm_vit, Encoder, HuggingFaceViT, HuggingFaceLlama])
def test_every_attention_goes_through_it(make, monkeypatch):
    calls = []
    right = attention_ops._attend_heads
    monkeypatch.setattr(attention_ops, "_attend_heads", lambda *x: calls.append(x[0].shape) or right(*x))
    critic = make()
    for is_training in (True, False):
        critic.train(is_training)
        with second_order_attention():
            critic(torch.randn(2, 3, 16, 16, requires_grad=True))
        with second_order_attention(), torch.no_grad():
            critic(torch.randn(2, 3, 16, 16))
    assert len(calls) == 2 * 4
    critic(torch.randn(2, 3, 16, 16))
    assert len(calls) == 2 * 4


@pytest.mark.parametrize("make", [timm_vit, Encoder])
@pytest.mark.parametrize("entered", ["inside", "around"])
def test_compiled_as_one_graph(make, entered):
    critic, x = make().double(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def inside(x):
        with second_order_attention():
            return critic(x)

    function = torch.compile(inside if entered == "inside" else critic, backend=backend, fullgraph=True)
    with second_order_attention():
        expected = critic(x)
        actual = function(x) if entered == "around" else None
    actual = function(x) if actual is None else actual
    torch.testing.assert_close(actual, expected)
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum(target.startswith("fastgan.") for target in targets) == 2
    assert not any("scaled_dot_product" in target for target in targets)


def test_memory_of_a_penalty_grows_with_the_tokens_not_their_square():
    """The most bytes alive during R1 through a layer at 4096 tokens, against the 67 MB of one map of it."""
    layer = nn.TransformerEncoderLayer(8, 1, 8, dropout=0, batch_first=True)
    peaks = []
    for tokens in (1024, 4096):
        with PeakBytes() as memory:
            x = torch.randn(1, tokens, 8)
            with second_order_attention():
                penalty = r1_penalty(lambda x: layer(x).pow(3).mean((1, 2)), x)
            torch.autograd.grad(penalty, list(layer.parameters()), allow_unused=True)
        peaks.append(memory.peak)
    assert peaks[1] < 4 * 4096 * 4096 / 2
    assert peaks[1] < 5 * peaks[0]


def test_dropout_is_refused():
    layer = nn.TransformerEncoderLayer(8, 1, 8, dropout=0.1, batch_first=True)
    with second_order_attention(), pytest.raises(ValueError, match="dropout_p must be 0 .put the module in eval mode"):
        layer(torch.randn(1, 4, 8))
    with second_order_attention():
        layer.eval()(torch.randn(1, 4, 8))


def test_a_learned_bias_has_gradients_of_both_orders():
    q = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)

    def attend(q, bias):
        with second_order_attention():
            return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=bias)

    assert torch.autograd.gradgradcheck(attend, (q, bias))


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
def test_penalties_without_it_name_the_cure(penalty):
    x = torch.randn(2, 3, 16, 16)
    with pytest.raises(RuntimeError, match=r"with fastgan.nn.second_order_attention\(\)") as caught:
        penalty(Encoder(), x)
    assert "is not implemented" in str(caught.value.__cause__)


def test_the_mode_is_left_on_errors():
    with pytest.raises(ZeroDivisionError), second_order_attention():
        raise ZeroDivisionError
    assert not any(isinstance(m, SecondOrderAttention) for m in torch.overrides._get_current_function_mode_stack())
