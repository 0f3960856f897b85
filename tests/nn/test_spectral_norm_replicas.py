"""Replicas as nn.DataParallel makes them take the tensors of their own device, not those of the first."""

import threading
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as older_spectral_norm

from fastgan.nn import fuse, group_spectral_norm, normed_weight, spectral_norm
from tests.nn.normed_networks import grouped, images, network, norms, train

KINDS = {
    "single": lambda: network(spectral_norm),
    "grouped": grouped,
    "step": lambda: grouped(updates="step"),
    "fused": lambda: fuse(network(parametrizations.spectral_norm))[0],
    "fused older": lambda: fuse(network(older_spectral_norm))[0],
}


def replica_of(model, parameters, buffers):
    """A replica with the given tensors, made by the steps of torch.nn.parallel.replicate, which needs GPUs."""
    originals = list(model.modules())
    copies = {module: module._replicate_for_data_parallel() for module in originals}
    for module, copy in copies.items():
        copy._former_parameters = OrderedDict()
        for key, child in module._modules.items():
            if child is None:
                copy._modules[key] = None
            else:
                setattr(copy, key, copies[child])
        for key, parameter in module._parameters.items():
            if parameter is None:
                copy._parameters[key] = None
            else:
                setattr(copy, key, parameters[parameter])
        for key, buffer in module._buffers.items():
            if buffer is None:
                copy._buffers[key] = None
            else:
                setattr(copy, key, buffers[buffer])
    return copies[model]


def other_device(model, factor=1.0):
    """Non-leaf copies of the parameters, and copies of the buffers, as on a second device."""
    parameters = {p: p * factor for p in model.parameters()}
    return parameters, {b: b.clone() for b in model.buffers()}


def reference(kind, model):
    norm = older_spectral_norm if "older" in kind else parametrizations.spectral_norm
    reference = network(norm).train(model.training)
    reference.load_state_dict(model.state_dict())
    return reference


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_replica_normalizes_its_own_weights(kind, training):
    model = KINDS[kind]()
    train(model, 1)
    model.train(training).zero_grad()
    with torch.no_grad():
        model(images())  # with what evaluation keeps of the first device at hand
    expected = reference(kind, model)
    with torch.no_grad():
        for p in expected.parameters():
            p.mul_(3)
    before = [b.clone() for b in model.buffers()]
    parameters, buffers = other_device(model, 3.0)
    replica = replica_of(model, parameters, buffers)
    outputs = replica(images()), expected(images())
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p.grad, 3 * q.grad, msg=lambda m, name=name: f"{name}: {m}")
    for buffer, other in zip(buffers.values(), expected.buffers(), strict=True):
        torch.testing.assert_close(buffer, other)
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_during_a_forward_and_in_threads(kind):
    """A part below the root runs as replicas, in threads, while the root's forward has supplied the original."""
    model = KINDS[kind]()
    train(model, 1)
    model.eval()
    expected = reference(kind, model)
    for p in expected[0].parameters():
        p.data.mul_(-2)
    outputs, x = [], images()

    def run():
        with torch.no_grad():
            parameters = {p: p * (-2) for p in model[0].parameters()}
            replica = replica_of(model[0], parameters, {b: b.clone() for b in model[0].buffers()})
            outputs.append(replica(x))

    def run_replicas(*_):
        run()
        threads = [threading.Thread(target=run) for _ in range(2)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]

    model[1].register_forward_pre_hook(run_replicas)
    with torch.no_grad():
        model(x)
        assert len(outputs) == 3
        for output in outputs:
            torch.testing.assert_close(output, expected[0](x))


def test_a_replica_is_one_group_with_one_update_for_a_layer_used_twice(monkeypatch):
    layer = nn.Linear(4, 4)
    model = group_spectral_norm(nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(4, 2)))
    sizes = []
    update = normed_weight.update_vectors
    monkeypatch.setattr(normed_weight, "update_vectors", lambda w, *a: sizes.append(len(w)) or update(w, *a))
    parameters, buffers = other_device(model)
    replica = replica_of(model, parameters, buffers)
    x = torch.randn(3, 4)
    output = replica(x)
    assert sizes == [2]
    assert not any(norm._supplied for norm in norms(model) + norms(replica))
    torch.testing.assert_close(output, model(x))
    for buffer, original in zip(buffers.values(), model.buffers(), strict=True):
        torch.testing.assert_close(buffer, original)


def test_an_ungrouped_layer_of_a_replica_makes_an_update_at_each_access():
    model = group_spectral_norm(nn.Sequential(nn.Linear(4, 4)))
    added = spectral_norm(nn.Linear(4, 4))
    model.extend([added, nn.ReLU(), added])
    parameters, buffers = other_device(model)
    x = torch.randn(3, 4)
    output = replica_of(model, parameters, buffers)(x)
    torch.testing.assert_close(output, model(x))
    for buffer, original in zip(buffers.values(), model.buffers(), strict=True):
        torch.testing.assert_close(buffer, original)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_data_parallel_on_gpus(kind):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model, x = KINDS[kind]().cuda(), torch.cat([images(), images()]).cuda()
    expected = reference(kind, model).cuda()
    for _ in range(2):
        outputs = nn.DataParallel(model, device_ids=[0, 1])(x), expected(x)
        torch.testing.assert_close(*outputs)
