"""Check an installed fastgan. The arguments, ``cpu`` and ``cuda``, name halves of the extension that it must have."""

import sys
from pathlib import Path

import torch

import fastgan
from fastgan.linalg import trace_sqrt_product
from fastgan.nn import SelfAttention2d, group_spectral_norm

status = fastgan.backend_status()
print(f"fastgan {fastgan.__version__} in {Path(fastgan.__file__).parent}\n{status}")
if "site-packages" not in fastgan.__file__:
    sys.exit("this is not an installed fastgan")
for half in sys.argv[1:]:
    built = status[f"extension {half}"]
    if not built.available and not built.detail.startswith("built, with no CUDA device"):
        sys.exit(f"the {half} half of the extension does not load: {built.detail}")

identity = torch.eye(64, dtype=torch.float64)
torch.testing.assert_close(trace_sqrt_product(identity, 4 * identity).item(), 128.0, rtol=1e-12, atol=0)
critic = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 4, 2, 1), SelfAttention2d(16), torch.nn.Conv2d(16, 1, 4))
group_spectral_norm(critic)
images = torch.randn(2, 3, 16, 16, requires_grad=True)
(gradient,) = torch.autograd.grad(critic(images).sum(), images, create_graph=True)
gradient.square().mean().backward()
assert all(p.grad is not None and p.grad.isfinite().all() for p in critic.parameters() if p.numel() > 1)
print("ok")
