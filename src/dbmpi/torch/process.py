"""What PyTorch's settings in this process should be: threads, and memory that is used again."""

from __future__ import annotations

from functools import cache

import torch

from dbmpi.machine import threads
from dbmpi.machine.allocation import keep_freed_memory


@cache
def prepare() -> None:
    """Give PyTorch as many threads as dbmpi's own kernels at most, and let it use freed memory again.

    Autograd allocates the gradient of each parameter anew in every step, and to fill pages that are new takes longer
    than to compute with old ones: a sixth of a step of the paper's network for speech.
    """
    limit = threads.prepare().threads
    if torch.get_num_threads() > limit:
        torch.set_num_threads(limit)
    keep_freed_memory()
