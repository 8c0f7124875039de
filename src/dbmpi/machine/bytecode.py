"""Where Python's bytecode is kept if the installation has none and Python may not write it there.

Without bytecode every rank compiles the sources of NumPy, Numba and SciPy whenever it starts, which doubles the
processor time of a start: installers such as uv leave none behind, ``PYTHONDONTWRITEBYTECODE`` is usual in images of
containers, and an installation may belong to somebody else.
"""

from __future__ import annotations

import os
import sys
from importlib import util
from pathlib import Path

from dbmpi.machine import kernel_cache


def prepare() -> Path | None:
    """Let Python keep bytecode in the user's private directory of this node, where it has no better place.

    Returns
    -------
    Path or None
        The directory; None where nothing was changed, as there is bytecode, Python writes it by itself, or a
        directory was chosen already (``PYTHONPYCACHEPREFIX``).
    """
    if sys.pycache_prefix is not None or _is_kept():
        return None
    place = kernel_cache.private_directory(f"bytecode-py{sys.version_info.major}{sys.version_info.minor}")
    if place is not None:
        sys.pycache_prefix, sys.dont_write_bytecode = str(place), False
    return place


def _is_kept() -> bool:
    """Return whether the largest library has bytecode beside its sources, or will have it after this start."""
    spec = util.find_spec("numba")
    if spec is None or spec.origin is None:
        return True
    kept = Path(util.cache_from_source(spec.origin))
    writable = os.access(kept.parent if kept.parent.exists() else kept.parent.parent, os.W_OK | os.X_OK)
    return kept.exists() or (writable and not sys.dont_write_bytecode)
