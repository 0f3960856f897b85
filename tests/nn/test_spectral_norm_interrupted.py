"""Forwards of a grouped network that end otherwise than by returning, begin within one another, or run in threads."""

import copy
import threading
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from fastgan.nn import fuse, group_spectral_norm
from tests.nn.normed_networks import assert_same_state, grouped, images, network, norms, vectors


class Stopped(BaseException):
    pass


class Critic(nn.Module):
    """Runs ``between`` after its first layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.between = lambda: None

    def forward(self, x):
        y = self.first(x)
        self.between()
        return self.second(y)


def reference(critic):
    """The same weights and vectors under torch's own norm, in a network that was never interrupted."""
    plain = Critic()
    for layer in (plain.first, plain.second):
        parametrizations.spectral_norm(layer)
    plain.load_state_dict(critic.state_dict())
    return plain.train(critic.training)


def raising(exception):
    def stop():
        raise exception

    return stop


def interrupt(critic, exception=KeyboardInterrupt):
    critic.between = raising(exception)
    with pytest.raises(exception):
        critic(torch.ones(1, 4))
    critic.between = lambda: None


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
ENDS = [KeyboardInterrupt, SystemExit, GeneratorExit, Stopped, ValueError]


@pytest.mark.parametrize("exception", ENDS)
def test_training_goes_on_after_any_exception(exception):
    ours = group_spectral_norm(Critic())
    interrupt(ours, exception)
    torchs = reference(ours)
    for model in (ours, torchs):
        for _ in range(3):
            model(X).square().sum().backward()
    assert_same_state(ours, torchs)
    for a, b in zip(ours.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def changed(model):
    generator = torch.Generator().manual_seed(4)
    return {key: torch.randn(value.shape, generator=generator) for key, value in model.state_dict().items()}


@pytest.mark.parametrize("exception", ENDS)
@pytest.mark.parametrize("read", ["forward", "layer", "weight", "remove"])
def test_nothing_reads_a_weight_of_an_interrupted_forward(exception, read):
    ours = group_spectral_norm(Critic()).eval()
    with torch.no_grad():
        interrupt(ours, exception)
        ours.load_state_dict(changed(ours))
        torchs = reference(ours)
        if read == "forward":
            torch.testing.assert_close(ours(X), torchs(X))
        elif read == "layer":
            torch.testing.assert_close(ours.second(X), torchs.second(X))
        elif read == "weight":
            torch.testing.assert_close(ours.second.weight, torchs.second.weight)
        else:
            nn.utils.parametrize.remove_parametrizations(ours.second, "weight")
            torch.testing.assert_close(ours.second.weight, torchs.second.weight)


def test_fused_networks_too():
    theirs = Critic()
    theirs.first, theirs.second = nn.utils.spectral_norm(theirs.first), nn.utils.spectral_norm(theirs.second)
    ours, report = fuse(theirs, copy=True)
    assert len(report.swapped) == 2
    for exception in ENDS:
        ours.train()
        interrupt(ours, exception)
        torchs = copy.deepcopy(theirs)
        torchs.load_state_dict(ours.state_dict())
        for _ in range(2):
            torch.testing.assert_close(ours(X), torchs(X))
            ours(X).sum().backward(), torchs(X).sum().backward()
        ours.eval(), torchs.eval()
        with torch.no_grad():
            interrupt(ours, exception)
            state = changed(ours)
            ours.load_state_dict(state), torchs.load_state_dict(state)
            torch.testing.assert_close(ours.second(X), torchs.second(X))
            torch.testing.assert_close(ours(X), torchs(X))


def test_a_hook_that_raises_before_or_after():
    for register in ("register_forward_pre_hook", "register_forward_hook"):
        for prepend in (False, True):
            ours = group_spectral_norm(Critic())
            handle = getattr(ours, register)(lambda *_: raising(KeyboardInterrupt)(), prepend=prepend)
            with pytest.raises(KeyboardInterrupt):
                ours(X)
            handle.remove()
            torchs = reference(ours)
            for model in (ours, torchs):
                model(X).sum().backward()
                model(X).sum().backward()
            assert_same_state(ours, torchs)


def test_a_hook_that_raises_in_a_nested_forward_takes_nothing_from_the_outer_one():
    inner = group_spectral_norm(Critic())
    outer = Critic()
    outer.inner = inner
    group_spectral_norm(outer)
    inner.register_forward_pre_hook(lambda *_: raising(ValueError)(), prepend=True)

    def run_inner():
        with suppress(ValueError):
            inner(X)

    outer.between = run_inner
    before = vectors(outer.second)
    outer(X)
    torchs = reference(group_spectral_norm(Critic()))
    torchs.second.parametrizations.weight[0]._u.copy_(before[0])
    torchs.second.parametrizations.weight[0]._v.copy_(before[1])
    torchs.second.weight  # noqa: B018 - one update, as the outer forward made
    torch.testing.assert_close(vectors(outer.second), vectors_of_torch(torchs.second))


def vectors_of_torch(layer):
    norm = layer.parametrizations.weight[0]
    return [norm._u, norm._v]


def test_a_forward_continues_after_a_nested_one_was_interrupted():
    inner, outer = group_spectral_norm(Critic()), Critic()
    outer.between = lambda: interrupt(inner)
    group_spectral_norm(outer)  # the inner network is not below it
    outer(X).sum().backward()
    outer(X).sum().backward()
    torchs = reference(inner)
    torch.testing.assert_close(inner(X), torchs(X))
    assert not any(norm._supplied for norm in norms(inner) + norms(outer))


def test_reentrant_forwards_share_one_update():
    ours = group_spectral_norm(Critic())
    depth = []

    def again():
        if len(depth) < 1:
            depth.append(None)
            depth.append(ours(X))  # itself calls again()

    before = reference(ours)
    ours.between = again
    output = ours(X)
    torch.testing.assert_close(output, before(X))
    assert_same_state(ours, before)  # torch's made one update as it was called once
    (output.sum() + depth[1].sum()).backward()


def test_a_reentrant_forward_that_is_interrupted_and_caught():
    ours = group_spectral_norm(Critic())
    torchs = reference(ours)

    def once():
        ours.between = raising(KeyboardInterrupt)
        with suppress(KeyboardInterrupt):
            ours(X)

    ours.between = once
    torch.testing.assert_close(ours(X), torchs(X))
    ours.between = lambda: None
    torch.testing.assert_close(ours(X), torchs(X))
    assert_same_state(ours, torchs)


def test_a_forward_interrupted_in_one_generator_and_run_in_another():
    ours = group_spectral_norm(Critic()).eval()

    def outputs():
        while True:
            try:
                yield ours(X)
            finally:
                ours.between = raising(GeneratorExit)
                ours(X)

    running = outputs()
    with torch.no_grad():
        next(running)
        running.close()
        ours.between = lambda: None
        ours.load_state_dict(changed(ours))
        torch.testing.assert_close(ours(X), reference(ours)(X))


def test_other_weights_during_a_forward():
    ours = group_spectral_norm(Critic()).eval()
    other = {name: value * -2 for name, value in ours.second.named_parameters()}
    found = []
    ours.between = lambda: found.append(torch.func.functional_call(ours.second, other, (X,)))
    ours(X)
    expected = torch.func.functional_call(reference(ours).second, other, (X,))
    torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize("training", [True, False])
def test_weights_that_change_during_a_forward(training):
    """A weight changed within a forward is normalized anew by its layer."""
    ours = group_spectral_norm(Critic()).train(training)
    found = []

    def load():
        with torch.no_grad():
            ours.second.parametrizations.weight.original.normal_()
        found.append(reference(ours).second(ours.first(X)))

    ours.between = load
    with torch.no_grad():
        torch.testing.assert_close(ours(X), found[0])


def test_threads_do_not_share_normalized_weights():
    """A second thread begins and ends its forward while the first is between its layers."""
    ours = group_spectral_norm(Critic())
    first, second = threading.Event(), threading.Event()

    def between():
        if threading.current_thread() is not threading.main_thread():
            first.set()
            assert second.wait(60)

    ours.between = between
    outputs = []
    thread = threading.Thread(target=lambda: outputs.append(ours(X)))
    torchs = reference(ours)
    thread.start()
    assert first.wait(60)
    outputs.append(ours(X))
    outputs[0].sum().backward()  # through the main thread's weights alone
    second.set()
    thread.join()
    outputs[1].sum().backward()
    expected = [torchs(X), torchs(X)]
    torch.testing.assert_close(outputs, expected[::-1])
    assert_same_state(ours, torchs)
    assert not any(norm._supplied for norm in norms(ours))


def test_evaluation_in_many_threads():
    ours, x = grouped().eval(), images()
    expected = ours(x)
    outputs = []

    def run():
        with torch.no_grad():
            outputs.extend(ours(x) for _ in range(5))

    threads = [threading.Thread(target=run) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(outputs) == 20
    for output in outputs:
        torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("training", [True, False])
def test_compiled_parts_and_graph_breaks(training):
    """A compiled layer of an eager root takes the group's weight; a broken graph leaves nothing behind."""
    for compile_ in (
        lambda m: setattr(m, "second", torch.compile(m.second, backend="aot_eager")),
        lambda m: m.compile(backend="aot_eager"),
    ):
        ours = group_spectral_norm(Critic()).train(training)
        torchs = reference(ours)
        ours.between = torch._dynamo.graph_break
        compile_(ours)
        for _ in range(2):
            torch.testing.assert_close(ours(X), torchs(X))
            ours(X).sum().backward(), torchs(X).sum().backward()
        assert not any(norm._supplied for norm in norms(ours))
        interrupt(ours)
        torchs.load_state_dict({key.replace("_orig_mod.", ""): value for key, value in ours.state_dict().items()})
        ours.between = torch._dynamo.graph_break
        torch.testing.assert_close(ours(X), torchs(X))


def test_evaluation_before_training_in_inference_mode():
    for arguments in ({}, {"updates": "step"}):
        for training in (True, False):
            ours, torchs = grouped(**arguments).train(training), network(parametrizations.spectral_norm).train(training)
            with torch.inference_mode():
                torch.testing.assert_close(ours(images()), torchs(images()))
            if training and not arguments:
                torchs.train()
            elif training:
                torchs.eval()  # no second update: the weights are the same
            outputs = ours(images()), torchs(images())
            torch.testing.assert_close(*outputs)
            for model, output in zip((ours, torchs), outputs, strict=True):
                output.square().sum().backward()
                model.train()(images()).square().sum().backward()
            if not arguments:
                for a, b in zip(ours.parameters(), torchs.parameters(), strict=True):
                    torch.testing.assert_close(a.grad, b.grad)


class StoredU(nn.Linear):
    """A layer that stores u alone, as BigGAN's: each forward makes v from it, and u from v, and in training keeps u."""

    num_itrs, eps = 1, 1e-12

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("u0", torch.randn(1, self.out_features))
        self.register_buffer("sv0", torch.ones(1))

    def W_(self):
        with torch.no_grad():
            v = nn.functional.normalize(self.u0 @ self.weight, eps=self.eps)
            u = nn.functional.normalize(v @ self.weight.T, eps=self.eps)
            if self.training:
                self.u0[:] = u
        sigma = u @ self.weight @ v.T
        if self.training:
            with torch.no_grad():
                self.sv0[:] = sigma
        return self.weight / sigma

    def forward(self, x):
        return nn.functional.linear(x, self.W_(), self.bias)


@pytest.mark.parametrize("kind", ["older", "parametrization", "stored"])
@pytest.mark.parametrize("training", [True, False])
def test_fused_networks_after_inference_mode(kind, training):
    torch.manual_seed(0)
    norm = {"older": nn.utils.spectral_norm, "parametrization": parametrizations.spectral_norm}.get(kind)
    layers = [StoredU(4, 4), StoredU(4, 4)] if norm is None else [norm(nn.Linear(4, 4)), norm(nn.Linear(4, 4))]
    theirs = nn.Sequential(layers[0], nn.Tanh(), layers[1])
    ours, report = fuse(theirs)
    assert len(report.swapped) == 2
    ours = copy.deepcopy(ours)  # which leaves out what the check computed
    for _ in range(2):
        for model in (ours, theirs):
            model.train(training)
        with torch.inference_mode():
            torch.testing.assert_close(ours(X), theirs(X))
        for model in (ours, theirs):
            model(X).square().sum().backward()
            model.train()(X).square().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_networks_made_in_inference_mode():
    with torch.inference_mode():
        ours, torchs = grouped(), network(parametrizations.spectral_norm)
        for _ in range(2):
            torch.testing.assert_close(ours(images()), torchs(images()))
        for model in (ours, torchs):
            model.eval()
            model(images())
            model[0].parametrizations.weight.original.view(-1)[1] = 9  # no version, and no entry that is sampled
        torch.testing.assert_close(ours(images()), torchs(images()))
