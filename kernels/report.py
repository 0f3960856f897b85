"""``python -m fastgan.kernels.report``: the resources of every kernel configuration on sm_80, sm_90 and sm_100.

Compiles each ahead of time and prints registers, bytes of local memory and the instructions in loops that use it,
shared memory, matrix instructions, and the share of a multiprocessor's warps that can be resident. The exit status is 1
if a configuration must not be launched.

``--model`` prints what the launches of attention would cost on an H100 instead: see
:mod:`fastgan.kernels.cost_model`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import torch

from fastgan.backend import interpreting
from fastgan.kernels.aot import ARCHITECTURES, OPS, cases, compile_case
from fastgan.kernels.attention.launch import Heads
from fastgan.kernels.cost_model import HEADS_SHAPES, N_HEADS, SHAPES, Cost, attention_launches, launch_cost

T = TypeVar("T")
R = TypeVar("R")


def main() -> int:
    arguments = _parse()
    if interpreting():
        print("kernels cannot be compiled while TRITON_INTERPRET is set", file=sys.stderr)
        return 2
    if arguments.model:
        return _model(arguments)
    jobs = [(op, capability) for op in arguments.op or OPS for capability in arguments.capability]
    tasks = [
        (op, capability, arguments.rows, i)
        for op, capability in jobs
        for i in range(len(cases(op, capability, arguments.rows)))
    ]
    rows = []
    with mapped(_compile, tasks, arguments.processes) as results:
        for row, violations in results:
            rows.append(row | {"violations": violations})
            if not arguments.json:
                print(_line(row), *(f"  NO: {v}" for v in violations), sep="\n", flush=True)
    if arguments.json:
        print(json.dumps(rows))
    return int(any(row["violations"] for row in rows))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fastgan.kernels.report", description=__doc__)
    parser.add_argument("--op", action="append", choices=list(OPS), help="may be repeated; all by default")
    parser.add_argument("--capability", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--rows", action="store_true", help="each tile once, not for every dtype and layout")
    parser.add_argument("--json", action="store_true", help="print one JSON list in place of the table")
    parser.add_argument("--model", action="store_true", help="print modeled microseconds, floors and their ratios")
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1))
    return parser.parse_args()


@contextlib.contextmanager
def mapped(function: Callable[[T], R], tasks: Sequence[T], processes: int) -> Iterator[Iterator[R]]:
    """Results of ``tasks`` in their order, by so many processes; by this one if it is 1, since each imports torch."""
    if processes == 1:
        gc.freeze()  # the modules, which each collection of the compiler's garbage would visit
        yield map(function, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield pool.imap(function, tasks)


def _compile(task: tuple[str, int, bool, int]) -> tuple[dict[str, Any], list[str]]:
    op, capability, rows, i = task
    case = cases(op, capability, rows)[i]
    report = compile_case(case, capability)
    return {"op": op} | asdict(report), report.violations(case)


def _model(arguments: argparse.Namespace) -> int:
    tasks = [(shape, dtype) for shape in (*SHAPES, *HEADS_SHAPES) for dtype in ("bfloat16", "float32")]
    rows = []
    with mapped(_costs, tasks, arguments.processes) as results:
        for (shape, dtype), costs in zip(tasks, results, strict=True):
            rows += [{"shape": shape, "dtype": dtype, **asdict(cost), "ratio": cost.ratio} for cost in costs]
            if not arguments.json:
                print(f"{shape}, {dtype}: {_sums(costs)}", *(f"  {cost}" for cost in costs), sep="\n", flush=True)
    if arguments.json:
        print(json.dumps(rows))
    return 0


def _costs(task: tuple[str, str]) -> list[Cost]:
    shape, dtype = task
    heads = Heads(N_HEADS, 1, mask=None, sinks=None, is_causal=False) if shape in HEADS_SHAPES else None
    sizes = (SHAPES | HEADS_SHAPES)[shape]
    launches = attention_launches(sizes, getattr(torch, dtype), heads=heads)
    return [launch_cost(launch, sizes) for launch in launches]


def _sums(costs: list[Cost]) -> str:
    """Return the microseconds of each pass, all its launches together."""
    sums: dict[str, float] = {}
    for cost in costs:
        sums[cost.direction] = sums.get(cost.direction, 0.0) + cost.microseconds
    return ", ".join(f"{direction} {microseconds:.0f} us" for direction, microseconds in sums.items())


def _line(row: dict[str, Any]) -> str:
    return (
        f"sm_{row['capability']:<3} {row['kernel']:<30} {row['label']:<40} registers {row['registers']:>3}  "
        f"local {row['local']:>4} B, {row['local_in_loops']:>3} in loops  shared {row['shared']:>6} B  "
        f"occupancy {row['occupancy']:4.0%}  " + " ".join(row["mma"])
    )


if __name__ == "__main__":
    sys.exit(main())
