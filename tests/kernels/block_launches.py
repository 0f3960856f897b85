"""Compile the very launches that attention blocks make: ``python -m tests.kernels.block_launches``, which prints a JSON
list, and ends with status 1 if one must not be launched. All blocks, channels, sizes, dtypes and layouts by default,
for sm_90; ``make kernels`` and the tests take some of them."""

import argparse
import functools
import itertools
import json
import os
import sys
from dataclasses import asdict
from unittest import mock

import torch

from fastgan.kernels.aot import ARCHITECTURES, case_of, compile_case
from fastgan.kernels.launch import recorded
from fastgan.kernels.report import mapped
from fastgan.nn import SelfAttention2d
from fastgan.nn import attention as module

CHANNELS = (64, 96, 128, 160, 192, 256, 320, 384)
HEIGHTS = (32, 33)
DTYPES = ("bfloat16", "float32")
LAYOUTS = {"channels-first": torch.contiguous_format, "channels-last": torch.channels_last}
BLOCKS = {
    "canonical": {},
    "simple": {"pool": False, "bias": True},  # whose operands are views of what torch's convolutions make
}


def launches_of(block, channels, height, dtype, layout):
    """The launches of forward, backward and double backward of a block, at maps of ``height`` x ``height``."""
    x = torch.zeros(2, channels, height, height, dtype=getattr(torch, dtype))
    x = x.to(memory_format=LAYOUTS[layout]).requires_grad_()
    layer = SelfAttention2d(channels, impl="triton", **BLOCKS[block]).to(x.dtype)
    inputs = [x, *layer.parameters()]
    with mock.patch.object(module, "resolve", return_value="triton"), recorded() as made:
        y = layer(x)
        grad = torch.zeros_like(y).requires_grad_()
        first = torch.autograd.grad(y, inputs, grad, create_graph=True)
        torch.autograd.grad(first, [*inputs, grad], [torch.zeros_like(g) for g in first], allow_unused=True)
    return made


@functools.cache
def cases_of(*choices):
    """The distinct specializations of the blocks of these names, channels, heights, dtypes and layouts."""
    cases = {}
    for choice in itertools.product(*choices):
        for launch in launches_of(*choice):
            case = case_of(launch, " ".join([*map(str, choice), str(launch.config)]))
            key = (case.kernel.__name__, case.signature, case.constexprs, case.config, case.divisible)
            cases.setdefault(str(key), case)
    return list(cases.values())


def report(task):
    choices, i, capability = task
    case = cases_of(*choices)[i]
    found = compile_case(case, capability)
    return asdict(found) | {"violations": found.violations(case)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", nargs="+", default=list(BLOCKS))
    parser.add_argument("--channels", nargs="+", type=int, default=list(CHANNELS))
    parser.add_argument("--heights", nargs="+", type=int, default=list(HEIGHTS))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES))
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS))
    parser.add_argument("--capability", nargs="+", type=int, choices=ARCHITECTURES, default=[90])
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1))
    given = parser.parse_args()
    choices = tuple(tuple(getattr(given, name)) for name in ("blocks", "channels", "heights", "dtypes", "layouts"))
    tasks = [(choices, i, capability) for capability in given.capability for i in range(len(cases_of(*choices)))]
    violations = 0
    with mapped(report, tasks, given.processes) as rows:
        print("[", end="", flush=True)
        for i, row in enumerate(rows):
            print(",\n" * (i > 0) + json.dumps(row), end="", flush=True)
            violations += len(row["violations"])
    print("]")
    return int(violations > 0)


if __name__ == "__main__":
    sys.exit(main())
