"""Find the tensor that was first not finite in a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def first_non_finite(trainer: Any) -> str:
    """Do one step of a :class:`fastgan.training.Trainer` and describe the first tensor that is not finite, or "".

    Batches, outputs of layers, terms of the losses and updated weights are checked as they are computed. The trainer is
    left after the step: the caller restores its state.
    """
    found: list[str] = []

    def look(what: str, value: Any) -> None:
        for tensor in value if isinstance(value, (tuple, list)) else [value]:
            if not found and isinstance(tensor, Tensor) and not bool(torch.isfinite(tensor).all()):
                kind = "NaN" if bool(torch.isnan(tensor).any()) else "infinite"
                found.append(f"{kind} in {what}")

    networks = {"generator": trainer.generator, "discriminator": trainer.discriminator}
    hooks = [
        module.register_forward_hook(lambda _m, _i, output, what=f"the output of {network}.{name}": look(what, output))
        for network, root in networks.items()
        for name, module in root.named_modules()
        if name and not isinstance(module, nn.ModuleList)
    ]
    updates = {"discriminator": trainer.discriminator_step, "generator": trainer.generator_step}

    def watched(name: str) -> Any:
        def update(batch: Any) -> Any:
            for key, value in batch.items():
                look(f"{key} of the batch", value)
            terms = updates[name](batch)
            for term, value in terms.items():
                look(f"the {term} loss of the {name}", value)
            for key, parameter in networks[name].named_parameters():
                look(f"{name}.{key} after its update", parameter)
            return terms

        return update

    try:
        trainer.discriminator_step, trainer.generator_step = watched("discriminator"), watched("generator")
        with trainer.steps.eagerly():
            trainer.train_step()
    finally:
        trainer.discriminator_step, trainer.generator_step = updates["discriminator"], updates["generator"]
        for hook in hooks:
            hook.remove()
    return found[0] if found else ""
