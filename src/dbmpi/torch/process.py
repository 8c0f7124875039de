"""How much of the machine PyTorch uses in this process."""

from __future__ import annotations

import torch

from dbmpi.machine import threads


def limit_threads() -> None:
    """Give PyTorch at most as many threads as dbmpi's own kernels have."""
    limit = threads.prepare().threads
    if torch.get_num_threads() > limit:
        torch.set_num_threads(limit)
