"""On a CPU too, attention keeps no N x M map: peak memory at N = M = 4096, batch 4, where one map takes 268 MB."""

import subprocess
import sys

CODE = """
import resource
import torch
from fastgan.ops import attention
from fastgan.reference.attention import attention_eager

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def three_passes(f, n):
    q, k, v = (torch.randn(4, n, c).requires_grad_() for c in (8, 8, 32))
    first = torch.autograd.grad(f(q, k, v).square().sum(), (q, k, v), create_graph=True)
    torch.autograd.grad(sum(g.square().sum() for g in first), (q, k, v))

three_passes(attention, 64)
three_passes(attention_eager, 64)
start = peak()
three_passes(attention, 4096)
fused = peak()
with torch.no_grad():
    attention_eager(*(torch.randn(4, 4096, c) for c in (8, 8, 32)))
print(fused - start, peak() - fused)
"""


def test_peak_memory_is_linear():
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    fused, eager = map(float, result.stdout.split())
    assert fused < 150, f"three passes took {fused:.0f} MB more"
    assert eager > 250, "the measurement does not see the maps of the eager forward"
