import torch.distributed as dist

if dist.is_available():  # before any process group, whose threads it would keep past the end: fastgan/distributed.py
    import torch.distributed.nn  # noqa: F401
