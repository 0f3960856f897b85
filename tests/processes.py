"""Processes of one gloo group, for tests of work that several of them share."""

import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_in_group(work, size, folder):
    """Call ``work(rank, folder)`` in ``size`` processes of one group; an error in one of them is raised here."""
    mp.spawn(_work_in_group, args=(work, size, str(folder)), nprocs=size)


def _work_in_group(rank, work, size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    work(rank, folder)
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # A thread of gloo that outlives the group, which FSDP holds, aborts a process whose interpreter ends meanwhile. It
    # did so in 1 of 12 programs of torch alone.
    os._exit(0)
