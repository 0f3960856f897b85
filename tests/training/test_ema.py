"""The moving average, against its definition."""

import pytest
import torch
from torch import nn

from fastgan.nn import group_spectral_norm
from fastgan.training import EMA


class TestEMA:
    def test_follows_its_formula(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
        ema = EMA(model, decay=0.5)
        expected = {key: value.clone() for key, value in model.state_dict().items()}
        for t in range(12):
            with torch.no_grad():
                for tensor in (*model.parameters(), model[1].running_mean, model[1].running_var):
                    tensor.normal_()
            ema.update(model)
            decay = min(0.5, (1 + t) / (10 + t))
            for key, value in model.state_dict().items():
                if value.is_floating_point():
                    expected[key] = decay * expected[key] + (1 - decay) * value
        for key, value in ema.module.state_dict().items():
            torch.testing.assert_close(value, expected[key], rtol=1e-12, atol=1e-12)

    def test_spectral_norm_vectors_are_copied(self):
        model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
        group_spectral_norm(model)
        ema = EMA(model, decay=0.9)
        for _ in range(3):
            model(torch.randn(2, 4))
            ema.update(model)
        for key, value in model.state_dict().items():
            if key.endswith(("_u", "_v")):
                assert torch.equal(ema.module.state_dict()[key], value)

    def test_buffers_that_are_named_are_averaged(self):
        model = nn.BatchNorm1d(3)
        model.register_buffer("w_avg", torch.zeros(2))
        plain, named = EMA(model, 0.5), EMA(model, 0.5, buffers=("w_avg",))
        with torch.no_grad():
            model.w_avg.fill_(1.0), model.running_mean.fill_(1.0)
        for ema in (plain, named):
            ema.update(model)
        assert (plain.module.w_avg == 1).all()
        torch.testing.assert_close(named.module.w_avg, torch.full((2,), 0.9))
        torch.testing.assert_close(plain.module.running_mean, torch.full((3,), 0.9))
        assert (named.module.running_mean == 1).all()
        with pytest.raises(ValueError, match=r"buffers must name floating-point buffers, num_batches_tracked is torch"):
            EMA(model, 0.5, buffers=("num_batches_tracked",))

    def test_is_apart_from_the_model(self):
        model = nn.Linear(2, 2)
        ema = EMA(model, decay=0.9)
        before = model.weight.detach().clone()
        with torch.no_grad():
            ema.module.weight.zero_()
        assert torch.equal(model.weight, before)
        assert not ema.module.training
        assert not any(p.requires_grad for p in ema.module.parameters())

    def test_bad_decay(self):
        with pytest.raises(ValueError, match=r"decay must be in \[0, 1\)"):
            EMA(nn.Linear(2, 2), decay=1)
