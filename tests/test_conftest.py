import os

import pytest
import torch


@pytest.mark.skipif("PYTEST_XDIST_WORKER_COUNT" not in os.environ, reason="the tests run in one process")
def test_workers_share_the_cores():
    """Two workers whose threads wait for each other's cores are ten times slower."""
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])
