"""Without Triton or torchvision the layers still work, on their reference paths."""

import subprocess
import sys

import pytest

BLOCK = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None  # what an import finds then is an ImportError
"""

WORK = """
import torch, fastgan, fastgan.nn, fastgan.ops, fastgan.linalg
status = fastgan.backend_status()
assert not status["triton"].available and "import triton failed" in status["triton"].detail, str(status)
critic = torch.nn.Sequential(torch.nn.Conv2d(16, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 4, 1))
fastgan.nn.group_spectral_norm(critic)
x = torch.randn(2, 16, 4, 4, requires_grad=True)
(g,) = torch.autograd.grad(critic(fastgan.nn.SelfAttention2d(16)(x)).sum(), x, create_graph=True)
g.square().sum().backward()
assert x.grad.isfinite().all()
a = torch.eye(3, dtype=torch.float64)
assert abs(fastgan.linalg.trace_sqrt_product(a, 4 * a).item() - 6) < 1e-12
print("works")
"""

LEAN = """
import sys, fastgan, fastgan.nn, fastgan.ops, fastgan.linalg
extra = {"torchvision", "PIL", "torchmetrics", "typer", "rich", "matplotlib", "safetensors", "scipy", "sklearn", "timm"}
print(sorted(extra & set(sys.modules)))
"""


def run(code):
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "blocked", [{"triton"}, {"triton", "torchvision", "scipy", "torchmetrics"}], ids=["triton", "all"]
)
def test_layers_work_without(blocked):
    result = run(BLOCK.format(blocked=blocked) + WORK)
    assert result.stdout == "works\n", result.stderr


def test_layers_import_only_torch_triton_and_numpy():
    result = run(LEAN)
    assert result.stdout == "[]\n", result.stdout + result.stderr


def test_import_of_the_package_is_quick():
    code = "import time, torch; t = time.perf_counter(); import fastgan; print(time.perf_counter() - t)"
    assert min(float(run(code).stdout) for _ in range(2)) < 0.2
