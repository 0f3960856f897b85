import os

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # workers share the cores; read when torch and NumPy are first imported
    os.environ.setdefault(
        "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))
    )

import torch.distributed as dist

if dist.is_available():  # before any process group, whose threads it would keep past the end: fastgan/distributed.py
    import torch.distributed.nn  # noqa: F401
