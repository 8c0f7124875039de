"""What PyTorch's settings in this process should be: threads, and memory that is used again."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from dbmpi.machine import threads

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of ``mallopt``, from glibc's malloc.h."""
_LARGEST = 1 << 30
"""Bytes up to which memory that is freed stays with the process."""


@cache
def prepare() -> None:
    """Give PyTorch as many threads as dbmpi's own kernels at most, and let it use freed memory again.

    Autograd allocates the gradient of each parameter anew in every step.  By default glibc gets large ones from the
    system each time and gives them back, and to fill pages that are new takes longer than to compute with old ones: a
    sixth of a step of the paper's network for speech.  Other C libraries are left as they are.
    """
    limit = threads.prepare().threads
    if torch.get_num_threads() > limit:
        torch.set_num_threads(limit)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST)
        mallopt(_TRIM_THRESHOLD, _LARGEST)
