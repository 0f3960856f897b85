"""The training loop: weights move, losses stay finite, seeds repeat, a run resumes bit for bit."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

from fastgan.backend import BackendWarning
from fastgan.training import Callback, Every, NonFiniteLossError, ProgressBar, TrainConfig, Trainer
from tests.training.small_trainers import data, trainer
from tests.training.tiny_runs import assert_same


def weights(network):
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a) and a.keys() == b.keys()


def test_weights_move_and_losses_stay_finite():
    t = trainer()
    before = [weights(m) for m in (t.generator, t.discriminator, t.ema.module)]
    history = t.run(12)
    assert t.step == len(history) == 12
    assert all(torch.tensor(losses).isfinite().all() for losses in (history.discriminator, history.generator))
    for network, old in zip((t.generator, t.discriminator, t.ema.module), before, strict=True):
        new = weights(network)
        still = [name for name in old if torch.equal(old[name], new[name])]
        assert not still


def test_seeds():
    first, second, other = trainer(0), trainer(0), trainer(1)
    for t in (first, second, other):
        t.run()
    assert first.history == second.history
    assert same(first.ema.module.state_dict(), second.ema.module.state_dict())
    assert first.history != other.history


def test_global_random_state_is_not_used_in_training():
    first, second = trainer(), trainer()
    first.run()
    torch.manual_seed(99)
    second.run()
    assert same(first.generator.state_dict(), second.generator.state_dict())


def test_resumes_bit_for_bit():
    whole, broken = trainer(augment=("translation",)), trainer(augment=("translation",))
    whole.run()
    broken.run(2)
    file = io.BytesIO()
    torch.save(broken.state_dict(), file)
    file.seek(0)
    resumed = trainer(augment=("translation",))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    resumed.run()
    assert resumed.step == 4
    assert resumed.history == whole.history
    for name in ("generator", "discriminator"):
        assert same(getattr(resumed, name).state_dict(), getattr(whole, name).state_dict())
    assert same(resumed.ema.module.state_dict(), whole.ema.module.state_dict())


def test_one_discriminator_update_by_hand():
    t = trainer(n_critic=1)
    generator, discriminator = copy.deepcopy(t.generator), copy.deepcopy(t.discriminator)
    rng, loader = torch.Generator(), copy.deepcopy(t.loader)
    rng.set_state(t.rng.get_state())
    t.train_step()

    batch = loader.next()
    real, labels = batch["images"], batch["labels"]
    z = torch.randn(5, 8, generator=rng)
    fake_labels = torch.randint(3, (5,), generator=rng)
    fake = generator(z, fake_labels).detach()
    logits = discriminator(torch.cat([real, fake]), torch.cat([labels, fake_labels]))
    loss = torch.relu(1 - logits[:5]).mean() + torch.relu(1 + logits[5:]).mean()
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=4e-4, betas=(0.0, 0.9))
    loss.backward()
    optimizer.step()
    # In Adam's first step a gradient near zero, of either sign, moves its weight by as much as any other.
    clear = {name: p.grad.abs() > 1e-6 for name, p in discriminator.named_parameters()}
    for name, parameter in discriminator.named_parameters():
        got = dict(t.discriminator.named_parameters())[name]
        torch.testing.assert_close(got[clear[name]], parameter[clear[name]], rtol=0, atol=1e-6)
    t.flush()
    assert t.history.discriminator == [pytest.approx(loss.item(), rel=1e-5)]


def test_n_critic_counts_discriminator_updates():
    t = trainer(n_critic=3)
    calls = []
    t.discriminator.register_forward_hook(lambda *_: calls.append(1))
    t.run(2)
    assert len(calls) == 2 * (3 + 1)
    assert t.optimizer_d.state_dict()["state"][0]["step"] == 6
    assert t.optimizer_g.state_dict()["state"][0]["step"] == 2


def test_no_gradients_are_left_behind():
    t = trainer()
    t.run(1)
    assert all(p.grad is None for network in (t.generator, t.discriminator) for p in network.parameters())


def test_learning_rates_fall_linearly_after_decay_from():
    t = trainer(steps=8, decay_from=0.5, lr_generator=1e-3, lr_discriminator=2e-3)
    rates = []
    t.run(callbacks=[Every(1, lambda t: rates.append(t.optimizer_g.param_groups[0]["lr"]))])
    assert rates == pytest.approx([1e-3] * 5 + [0.75e-3, 0.5e-3, 0.25e-3])
    assert t.optimizer_d.param_groups[0]["lr"] == pytest.approx(0.5e-3)


@pytest.mark.parametrize("bad_step", [1, 3, 12])
def test_a_loss_that_is_not_finite_names_its_step(bad_step):
    t = trainer(steps=25)

    def poison(t):
        if t.step == bad_step - 1:
            with torch.no_grad():
                t.discriminator.head.linear.bias.fill_(float("nan"))

    if bad_step == 1:
        poison(t)
    with pytest.raises(NonFiniteLossError, match=f"not finite at step {bad_step}:") as raised:
        t.run(callbacks=[Every(1, poison)])
    assert raised.value.step == bad_step
    assert len(t.history) == bad_step - 1


class Recorder(Callback):
    def __init__(self):
        self.events = []

    def on_start(self, trainer, steps):
        self.events.append(("start", steps))

    def on_step(self, trainer):
        self.events.append(("step", trainer.step))

    def on_end(self, trainer):
        self.events.append(("end", trainer.step))


def test_callbacks():
    t, recorder = trainer(), Recorder()
    t.run(2, callbacks=[recorder])
    assert recorder.events == [("start", 2), ("step", 1), ("step", 2), ("end", 2)]


def test_losses_are_handed_over_with_their_terms():
    t, seen = trainer(), []

    class Losses(Callback):
        def on_losses(self, trainer, rows):
            seen.extend(rows)

    t.run(callbacks=[Losses()])
    assert len(seen) == 4
    assert [row["discriminator"] for row in seen] == t.history.discriminator
    assert all(row["discriminator"] == row["discriminator/adversarial"] for row in seen)


def test_a_stop_is_obeyed_after_the_step_under_way():
    t = trainer(steps=30)
    t.run(callbacks=[Every(13, lambda t: setattr(t, "stop_requested", True))])
    assert t.step == 13
    t.flush()
    assert len(t.history) == 13


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"optimizer": "adamw", "weight_decay": 0.1}, torch.optim.AdamW),
        ({"optimizer": "rmsprop", "momentum": 0.5}, torch.optim.RMSprop),
        ({"optimizer": "sgd", "momentum": 0.9}, torch.optim.SGD),
    ],
)
def test_optimizers(changes, kind):
    t = trainer(**changes)
    assert isinstance(t.optimizer_d, kind)
    group = t.optimizer_g.param_groups[0]
    assert group["weight_decay"] == changes.get("weight_decay", 0)
    assert group.get("momentum", 0) == changes.get("momentum", 0)
    before = weights(t.generator)
    t.run(2)
    assert any(not torch.equal(before[name], p) for name, p in t.generator.named_parameters())


def test_autocast_and_channels_last():
    t = trainer(precision="bf16", lr_generator=1e-3)
    dtypes, layouts = set(), set()
    convolution = t.discriminator.blocks[0].conv1

    def look(_module, _inputs, output):
        dtypes.add(output.dtype)
        layouts.add(output.is_contiguous(memory_format=torch.channels_last))

    convolution.register_forward_hook(look)
    history = t.run(3)
    assert dtypes == {torch.bfloat16}
    assert layouts == {True}
    assert {p.dtype for p in t.generator.parameters()} == {torch.float32}
    plain = trainer(lr_generator=1e-3, channels_last=False).run(3)
    assert history.discriminator == pytest.approx(plain.discriminator, rel=0.1)
    assert history.discriminator != plain.discriminator


def test_weights_are_clipped_after_each_update():
    t = trainer(clip=0.02, loss="wasserstein")
    t.run(2)
    assert max(p.abs().max().item() for p in t.discriminator.parameters()) == pytest.approx(0.02)
    assert max(p.abs().max().item() for p in t.generator.parameters()) > 0.02


def test_callbacks_end_after_an_error():
    t, recorder = trainer(), Recorder()

    def fail(_):
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        t.run(2, callbacks=[recorder, Every(1, fail)])
    assert recorder.events[-1] == ("end", 1)


class Unconditional(nn.Module):
    n_classes, dim_z = 4, 8


def test_bad_input():
    t = trainer()
    with pytest.raises(ValueError, match="generator must have the data's 3 classes, got 4"):
        Trainer(Unconditional(), t.discriminator, data(), t.config)
    with pytest.raises(ValueError, match="discriminator must have the data's 3 classes, got 4"):
        Trainer(t.generator, Unconditional(), data(), t.config)
    with pytest.raises(ValueError, match="loss must be one of"):
        Trainer(t.generator, t.discriminator, data(), TrainConfig(loss="huber"))
    with pytest.raises(
        ValueError, match="augment must be names out of 'color', 'translation', 'cutout', 'flip', got 'mixup'"
    ):
        Trainer(t.generator, t.discriminator, data(), TrainConfig(augment=("mixup",)))
    with pytest.raises(ValueError, match="batch_size must be from 1 to the number of images, 24, got 64"):
        Trainer(t.generator, t.discriminator, data(), TrainConfig(batch_size=64))
    with pytest.raises(ValueError, match="interval must be at least 1"):
        Every(0, print)


RICH = {
    "r1": 0.5,
    "r2": 0.5,
    "penalty_every": 3,
    "lecam": 0.1,
    "consistency": 1.0,
    "augment": ("color", "translation"),
    "augment_target": 0.1,
    "augment_images": 40,
}


@pytest.mark.parametrize("options", [RICH, RICH | {"shared_fake": True}, {"precision": "fp16"}])
def test_lazy_lecam_adaptive_consistent_and_scaled_runs_resume(options):
    """A run of each kind, in two parts; its other buffers and its scale are a part of its state."""
    options = options | {"steps": 7, "loss": "non-saturating", "networks": "dcgan"}
    whole, broken = trainer(**options), trainer(**options)
    whole.run()
    broken.run(4)
    file = io.BytesIO()
    torch.save(broken.state_dict(), file)
    file.seek(0)
    resumed = trainer(**options)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    resumed.run()
    assert whole.history == resumed.history
    for a, b in zip(whole._parts().values(), resumed._parts().values(), strict=True):
        torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)
    if "lecam" in options:
        assert whole.gan.state["lecam"].averages.all()
        assert whole.gan.state["augment"].p > 0
    else:
        assert whole.scaler.get_scale() > 0


def test_losses_of_lazy_terms_stand_for_their_mean():
    rows = []

    class Kept(Callback):
        def on_losses(self, trainer, new):
            rows.extend(new)

    trainer(**RICH, steps=6).run(callbacks=[Kept()])
    assert [row["discriminator/penalties"] > 0 for row in rows] == [True, False, False] * 2


@pytest.mark.parametrize("options", [RICH, RICH | {"shared_fake": True}])
def test_rich_losses_captured(options):
    """A captured run of the same options; a captured step with another result would warn."""
    runs = []
    for mode in ("eager", "compile"):
        t = trainer(networks="dcgan", **options, steps=4, step_mode=mode)
        t.steps.backend = "eager"
        with warnings.catch_warnings():
            warnings.simplefilter("error", BackendWarning)
            t.run()
        runs.append(t)
    for name, a in runs[0]._parts().items():
        if name not in ("loader", "optimizer_g", "optimizer_d"):
            torch.testing.assert_close(runs[1]._parts()[name].state_dict(), a.state_dict(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shared_fake": True, "n_critic": 2}, "shared_fake needs n_critic 1, got 2"),
        ({"augment_target": 0.6}, "augment_target needs augmentations in augment, which is empty"),
        ({"penalty_every": 0}, "penalty_every must be at least 1, got 0"),
        ({"lecam": -1.0}, "lecam must be at least 0 and finite, got -1"),
        ({"precision": "fp8"}, "precision must be one of 'fp32', 'bf16', 'fp16', got 'fp8'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


@pytest.mark.parametrize("worst", [1.01, -1.5, float("nan"), 255.0])
def test_images_outside_their_range_are_refused(worst):
    whole = data()
    whole.images[3, 0, 2, 2] = worst
    networks = trainer().generator, trainer().discriminator
    with pytest.raises(ValueError, match=r"images must be in \[-1, 1\], got "):
        Trainer(*networks, whole, TrainConfig(batch_size=4))


def test_early_actions_and_the_bar_of_a_run_that_goes_on():
    found = []
    run = trainer(steps=31)
    run.run(2)
    bar = ProgressBar()
    run.run(callbacks=[bar, Every(20, lambda t: found.append(t.step), at_end=True, early=True)])
    assert found == [20, 31]  # the tenth of 20 was before
    assert bar._bar.tasks[0].total == bar._bar.tasks[0].completed == 31
    found.clear()
    run = trainer(steps=5)
    run.run(callbacks=[Every(20, lambda t: found.append(t.step), early=True)])
    assert found == [2]


@pytest.mark.parametrize(("mode", "step"), [("eager", 1), ("eager", 4), ("eager", 11), ("eager", 13), ("compile", 13)])
def test_a_loss_that_is_not_finite_leaves_the_state_before_its_step(mode, step):
    """An image turns to NaN between two steps, and back once it is found: what a fault of the data looks like."""
    run, good = (trainer(networks="dcgan", steps=20, step_mode=mode) for _ in range(2))
    for each in (run, good):
        each.steps.backend = "eager"
    good.run(step - 1)
    images = run.loader.data.images
    forward = run.discriminator_step

    def poisoned(batch):
        return forward({**batch, "images": batch["images"] * (float("nan") if run.step == step - 1 else 1)})

    run.discriminator_step = poisoned
    with pytest.raises(NonFiniteLossError, match=f"at step {step}: .*; first NaN in") as raised:
        run.run()
    assert raised.value.where.startswith("NaN in the output of discriminator.")
    assert run.step == len(run.history) == step - 1
    assert images.isfinite().all()
    assert_same(run.state_dict(), good.state_dict())


def test_the_first_value_that_is_not_finite_is_named():
    run = trainer(steps=3)
    next(run.generator.parameters()).data.fill_(float("inf"))
    with pytest.raises(NonFiniteLossError) as raised:
        run.run()
    first = next(name for name, m in run.generator.named_modules() if any(True for _ in m.parameters(recurse=False)))
    assert raised.value.where.startswith(("NaN in the output of generator.", "infinite in the output of generator."))
    assert first in raised.value.where
    run = trainer(steps=3)
    run.loader.data.images[:] = float("nan")
    with pytest.raises(NonFiniteLossError, match="first NaN in images of the batch"):
        run.run()
    run = trainer(steps=3, lr_discriminator=1e38)
    with pytest.raises(NonFiniteLossError, match="first (NaN|infinite) in discriminator[.].* after its update"):
        run.run()
