import warnings

import pytest
import torch

import fastgan
from fastgan import backend
from fastgan.backend import BackendWarning, resolve, warn_once


def test_status_is_a_readable_table_with_a_reason_for_each_no():
    status = fastgan.backend_status()
    names = [b.name for b in status]
    assert names == ["torch", "triton", "interpreter", "gpu", "extension cpu", "extension cuda"]
    assert len(str(status).splitlines()) == len(names)
    assert all(b.detail for b in status)
    assert torch.__version__ in status["torch"].detail
    with pytest.raises(KeyError, match="no backend 'tpu'"):
        status["tpu"]


def test_auto_takes_the_reference_on_a_cpu():
    assert resolve("auto", torch.ones(1)) == "reference"
    assert resolve("reference", torch.ones(1)) == "reference"


def test_impossible_requests_say_why(monkeypatch):
    with pytest.raises(ValueError, match="impl must be one of 'auto', 'triton', 'reference', got 'fast'"):
        resolve("fast", torch.ones(1))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="needs CUDA tensors"):
        resolve("triton", torch.ones(1))
    monkeypatch.setattr(backend, "_triton", lambda: backend.Backend("triton", False, "import triton failed: broken"))
    with pytest.raises(ValueError, match="import triton failed: broken"):
        resolve("triton", torch.ones(1))


def test_a_warning_is_given_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_once("a backend is missing (test)")
        warn_once("a backend is missing (test)")
    assert [w.category for w in caught] == [BackendWarning]
