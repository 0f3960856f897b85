"""A context in which other people's transformers can be differentiated twice."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastgan.ops import scaled_dot_product_attention


class SecondOrderAttention(TorchFunctionMode):
    """The mode behind :func:`second_order_attention`."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call fastgan's function in place of torch's."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return scaled_dot_product_attention(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return _multi_head_attention_forward(*args, **kwargs)
        if func is Tensor.unflatten:  # torch 2.11's compiler cannot trace the method, which calls its super class
            return torch.unflatten(*args, **kwargs)
        return func(*args, **kwargs)


def second_order_attention() -> SecondOrderAttention:
    """Return a context in which ``F.scaled_dot_product_attention`` has gradients of gradients, in O(N) memory.

    Everything that calls torch's function inside, whoever wrote it, runs
    :func:`fastgan.ops.scaled_dot_product_attention`: timm's models, ``nn.MultiheadAttention`` with
    ``need_weights=False``, ``nn.TransformerEncoder``, Hugging Face's ``attn_implementation="sdpa"``. Gradients may be
    taken after the context was left. It may be entered within a compiled function or around one, and around the call
    of a train step.

    Attention that is dropped out (``dropout_p``) raises an error: give the module a dropout of 0. Modules that compute
    their maps themselves (``need_weights=True``, ``attn_implementation="eager"``, a learnt bias as Swin's) keep them
    in memory here too.

    Example:
        >>> import torch
        >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0, batch_first=True)
        >>> x = torch.randn(2, 5, 16, requires_grad=True)
        >>> with second_order_attention():
        ...     y = layer(x)
        >>> (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        >>> gradient.square().sum().backward()
        >>> x.grad.shape
        torch.Size([2, 5, 16])
    """
    return SecondOrderAttention()


def _attention_inside(*args: Any, **kwargs: Any) -> Tensor:
    return scaled_dot_product_attention(*args, **kwargs)


# The function passes itself to the mode before it calls the function to be replaced, which no mode sees then.
# So its code runs with other globals. Without __name__, as the compiler would look names up in the module of that name.
_multi_head_attention_forward = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {
        **{name: value for name, value in vars(F).items() if name != "__name__"},
        "has_torch_function": lambda _: False,
        "scaled_dot_product_attention": _attention_inside,
    },
    "multi_head_attention_forward",
    F.multi_head_attention_forward.__defaults__,
)
_multi_head_attention_forward.__kwdefaults__ = F.multi_head_attention_forward.__kwdefaults__
