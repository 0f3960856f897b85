"""``python -m fastgan.kernels.report``: what every kernel configuration uses on sm_80, sm_90 and sm_100.

Compiles each ahead of time, prints registers, local memory, shared memory, matrix instructions and the share of a
multiprocessor's warps that registers and shared memory let be resident; the exit status is 1 if a configuration must
not be launched.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import sys
from dataclasses import asdict

from fastgan.backend import interpreting

OPS = ("attention", "projection", "spectral_norm")


def main() -> int:
    arguments = _parse()
    if interpreting():
        print("kernels cannot be compiled while TRITON_INTERPRET is set", file=sys.stderr)
        return 2
    jobs = [(op, capability) for op in arguments.op or OPS for capability in arguments.capability]
    tasks = [(op, capability, i) for op, capability in jobs for i in range(_count(op, capability))]
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        rows = []
        for row, violations in pool.imap(_compile, tasks):
            rows.append(row | {"violations": violations})
            if not arguments.json:
                print(_line(row), *(f"  NO: {v}" for v in violations), sep="\n", flush=True)
    if arguments.json:
        print(json.dumps(rows))
    return int(any(row["violations"] for row in rows))


def _parse() -> argparse.Namespace:
    from fastgan.kernels.aot import ARCHITECTURES

    parser = argparse.ArgumentParser(prog="python -m fastgan.kernels.report", description=__doc__)
    parser.add_argument("--op", action="append", choices=OPS, help="may be repeated; all by default")
    parser.add_argument("--capability", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--json", action="store_true", help="print one JSON list in place of the table")
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1))
    return parser.parse_args()


def _cases(op: str, capability: int) -> list:
    module = {"attention": "attention.aot", "projection": "projection_config", "spectral_norm": "spectral_norm.launch"}[
        op
    ]
    return importlib.import_module(f"fastgan.kernels.{module}").aot_cases(capability)


def _count(op: str, capability: int) -> int:
    return len(_cases(op, capability))


def _compile(task: tuple[str, int, int]) -> tuple[dict, list[str]]:
    from fastgan.kernels.aot import compile_case

    op, capability, i = task
    case = _cases(op, capability)[i]
    report = compile_case(case, capability)
    return {"op": op} | asdict(report), report.violations(case)


def _line(row: dict) -> str:
    return (
        f"sm_{row['capability']:<3} {row['kernel']:<30} {row['label']:<40} registers {row['registers']:>3}  "
        f"local {row['spills']:>4} B  shared {row['shared']:>6} B  occupancy {row['occupancy']:4.0%}  "
        + " ".join(row["mma"])
    )


if __name__ == "__main__":
    sys.exit(main())
