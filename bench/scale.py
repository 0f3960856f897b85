"""``python -m bench.scale``: what each stage of a Frechet distance costs, and what travels between processes.

Measures every stage on one processor (decoding, the network, the moments, the root of the covariance), and a pass that
1 to 64 gloo processes share, with the network replaced by a timer: their numbers must be equal. Writes
``bench/results/<device>/scale.json``, from which ``python -m bench report`` makes the tables of ``docs/scale.md``.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bench.bench_fid import weights_file
from fastgan.bench.records import Record, Run, environment, results_folder, write_run
from fastgan.data.decode import decode_image
from fastgan.data.resize import clean_with_pillow
from fastgan.metrics import FeatureStats, load_backbone

RESULTS = Path(__file__).parent / "results"
DIM = 2048
SIZE, JPEGS = 256, 64  # of a photograph-like file, and how many are decoded
BATCH = 16
PROCESSES = (1, 2, 4, 8, 16, 32, 64)
IMAGES, FEATURES, TIMER = 4096, 64, 1e-3  # of the simulation: images in all, features, seconds of the network per image


def main() -> None:
    """Measure, write the record, and say where it is."""
    parser = argparse.ArgumentParser(description="What each stage of a Frechet distance costs.")
    parser.add_argument("--quick", action="store_true", help="small sizes and at most 4 processes, for a test")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dim, processes = (64, PROCESSES[:3]) if options.quick else (DIM, PROCESSES)
    simulated = simulation(processes, options.quick)  # first: it forks, which a process with threads must not
    records = (*stages(dim, options.quick), *simulated)
    path = options.results / results_folder("cpu") / f"scale{'-quick' if options.quick else ''}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_run(Run(environment("cpu"), options.quick, records), path)
    print(path)


def stages(dim: int, quick: bool) -> list[Record]:
    """Seconds per image, or in all, of each stage on one thread."""
    rng = np.random.default_rng(0)
    files = [_jpeg(rng) for _ in range(4 if quick else JPEGS)]
    images = [decode_image(content, "image") for content in files]
    features = torch.randn(2 * dim, dim, generator=torch.Generator().manual_seed(0))
    stats = FeatureStats(dim).update(features)
    other = FeatureStats(dim).update(features + 1)
    pixels = torch.rand(2 if quick else BATCH, 3, 299, 299) * 255
    network = load_backbone("inception", weights=weights_file(), dims=64 if quick else DIM)

    def root() -> None:
        stats._root = None
        stats.root()

    measured: dict[str, tuple[Callable[[], Any], int, int]] = {  # call, images in it, bytes in memory
        "decode": (lambda: [decode_image(content, "image") for content in files], len(files), 3 * SIZE * SIZE),
        "resize": (lambda: [clean_with_pillow(image, 299) for image in images], len(images), 12 * 299 * 299),
        "network": (lambda: network.from_pixels(pixels), len(pixels), _network_bytes(network)),
        "moments": (lambda: FeatureStats(dim).update(features), len(features), 8 * dim * dim),
        "merge": (lambda: FeatureStats(dim).merge(stats).merge(other), 0, 8 * dim * dim),
        "root": (root, 0, 8 * dim * dim),
    }
    return [
        _record(stage, {"dim": dim, "bytes": size, "images": n}, _timed(call, 1 if quick else 3), n)
        for stage, (call, n, size) in measured.items()
    ]


def simulation(processes: tuple[int, ...], quick: bool) -> list[Record]:
    """The pass and the reduction by numbers of processes; raises unless all find the same statistics."""
    records, expected = [], None
    n, seconds = (256, 1e-4) if quick else (IMAGES, TIMER)
    for count in processes:
        with tempfile.TemporaryDirectory() as folder:
            arguments = (count, folder, n, seconds)
            torch.multiprocessing.start_processes(worker, args=arguments, nprocs=count, start_method="fork")
            found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
        assert len(found) == count
        expected = expected or found[0]["digest"]
        error = max(_difference(one["digest"], expected) for one in found)
        if error > 1e-12:
            raise RuntimeError(f"{count} processes find other statistics: they differ by {error}")
        parameters = {
            "processes": count,
            "images": n,
            "features": FEATURES,
            "bytes": max(one["bytes"] for one in found),
            "pass_seconds": max(one["pass"] for one in found),
        }
        longest = [max(one["reduce"] for one in found)]
        records.append(_record(f"reduce-{count}", parameters, longest, n, error))
    return records


def worker(rank: int, size: int, folder: str, n: int, seconds: float) -> None:
    """One process of the simulation: its share of the images and the reduction. Results go to ``folder``."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    rows = torch.randn(n, FEATURES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = range(n * rank // size, n * (rank + 1) // size)
    stats = FeatureStats(FEATURES)
    dist.barrier()
    began = time.perf_counter()
    for start in range(share.start, share.stop, BATCH):
        batch = rows[start : min(start + BATCH, share.stop)]
        time.sleep(seconds * len(batch))  # the network
        stats.update(batch)
    passed = time.perf_counter() - began
    dist.barrier()
    sent = _count_bytes()
    began = time.perf_counter()
    stats.all_reduce()
    reduced = time.perf_counter() - began
    digest = [stats.n, stats.mean.sum().item(), stats.cov.sum().item(), stats.cov.square().sum().item()]
    found = {"pass": passed, "reduce": reduced, "bytes": sent(), "digest": digest}
    Path(folder, f"{rank:02}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _count_bytes() -> Callable[[], int]:
    """Begin to count the bytes of this process's tensors that collectives take; call the result for the number."""
    total = 0

    def counted(plain: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(plain)
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal total
            given = [value for value in (*arguments, *options.values()) if isinstance(value, torch.Tensor)]
            total += sum(value.numel() * value.element_size() for value in given)
            return plain(*arguments, **options)

        return call

    for name in ("all_reduce", "all_gather", "broadcast"):
        setattr(dist, name, counted(getattr(dist, name)))
    return lambda: total


def _difference(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / max(abs(b), 1e-300) for a, b in zip(found, expected, strict=True))


def _timed(call: Callable[[], Any], rounds: int) -> list[float]:
    call()
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return sorted(found)


def _record(
    workload: str,
    parameters: dict[str, Any],
    seconds: list[float],
    images: int,
    error: float | None = None,
) -> Record:
    return Record(
        suite="scale",
        workload=workload,
        implementation="fastgan",
        parameters=parameters,
        error=error,
        median=seconds[len(seconds) // 2],
        low=seconds[0],
        high=seconds[-1],
        rounds=len(seconds),
        images=images or None,
    )


def _jpeg(rng: np.random.Generator) -> bytes:
    """A file of smooth noise, which compresses about as photographs do."""
    from PIL import Image

    small = Image.fromarray(rng.integers(0, 256, (SIZE // 8, SIZE // 8, 3), dtype=np.uint8))
    content = io.BytesIO()
    small.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(content, "jpeg", quality=90)
    return content.getvalue()


def _network_bytes(network: Any) -> int:
    """Bytes of the weights."""
    return sum(p.numel() * p.element_size() for p in network._network.parameters())


if __name__ == "__main__":
    main()
