"""MPIs that others build, with mpi4py's wheel: Debian's MPICH and Open MPI, and Intel MPI, each in a folder of its own.

Nothing is installed into the system.  The libraries that dbmpi needs are those of this environment.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from harness.environment import plain_environment, timeout_scale
from parallel import tiny

MULTIARCH = sysconfig.get_config_var("MULTIARCH") or ""
pytestmark = [
    pytest.mark.skipif(
        os.environ.get("DBMPI_FAMILY_TESTS") != "1",
        reason="downloads several MPIs, which takes minutes: make test-families",
    ),
    pytest.mark.timeout(600),
]

CONFIGURATION = """
[run]
directory = "run"
[data]
train = "train.h5"
test = "test.h5"
[network]
loss = "softmax"
[[network.layers]]
units = 3
[optimizer]
batch_size = 6
epochs = 2
"""
MINE = """
import numpy as np
import dbmpi
from mpi4py import MPI
found = dbmpi.minimize(lambda x: (float(x @ x), 2 * x), np.ones(5))
if MPI.COMM_WORLD.rank == 0:
    print("minimized on", MPI.COMM_WORLD.size, found.converged, MPI.Get_library_version().split(",")[0])
"""


@dataclass
class Environment:
    """A bare Python environment in which there is at most one MPI."""

    bin: Path
    here: Path
    variables: dict[str, str] = field(default_factory=dict)

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run ``python words...`` there."""
        own = {name: value for name, value in plain_environment().items() if not name.startswith(("OMPI_", "OPAL_"))}
        libraries = f"{Path(__file__).parents[2] / 'src'}:{sysconfig.get_path('purelib')}"
        path = f"{self.variables.get('PATH', '')}:{self.bin}:{os.environ['PATH']}"
        return subprocess.run(
            [str(self.bin / "python"), *words],
            env=own | {"PYTHONPATH": libraries} | self.variables | {"PATH": path},
            cwd=self.here,
            capture_output=True,
            text=True,
            timeout=200 * timeout_scale(),
            check=False,
        )

    def assert_works(self, name: str) -> None:
        """Two ranks of this MPI train, and minimise in a script of a user's own."""
        done = self("-m", "dbmpi", "launch", "-n", "2", "--", "train", "config.toml")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "2 ranks: " in done.stdout
        done = self("-m", "dbmpi", "launch", "-n", "2", "--", "python", "mine.py")
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"minimized on 2 True {name}" in done.stdout


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    tiny.write_data(tmp_path)
    (tmp_path / "config.toml").write_text(CONFIGURATION)
    (tmp_path / "mine.py").write_text(MINE)
    return Environment(tmp_path / "venv" / "bin", tmp_path)


def unpack(package: str, here: Path) -> Path:
    """Unpack a Debian package, with all that it needs and this system lacks, and return the folder ``usr`` of it."""
    if not all(map(shutil.which, ("apt-get", "dpkg"))):
        pytest.skip("not Debian: there is no apt-get and dpkg")
    simulated = subprocess.run(
        ["apt-get", "--simulate", "--no-install-recommends", "install", package],
        capture_output=True,
        text=True,
        check=False,
    )
    names = re.findall(r"(?m)^Inst (\S+)", simulated.stdout)
    if not names:
        pytest.skip(f"apt-get offers no {package}, or it is installed: {simulated.stderr.strip()[-200:]}")
    archives = here / "archives"
    archives.mkdir()
    if subprocess.run(["apt-get", "download", *names], cwd=archives, capture_output=True, check=False).returncode != 0:
        pytest.skip(f"{package} cannot be downloaded")
    for archive in archives.iterdir():
        subprocess.run(["dpkg", "-x", archive, here / "system"], check=True)
    return here / "system" / "usr"


def test_debians_mpich(environment: Environment, tmp_path: Path) -> None:
    """The sentence that says what is missing has the fix, which is done here word by word."""
    usr = unpack("mpich", tmp_path)
    libraries = usr / "lib" / MULTIARCH
    environment.variables = {"LD_LIBRARY_PATH": str(libraries), "PATH": str(usr / "bin"), "HOME": str(tmp_path)}
    done = environment("-c", "import dbmpi; dbmpi.minimize")
    assert done.returncode == 2, done.stderr
    fix = re.search(r"(mkdir -p \S+ && ln -s \S+ \S+), and export LD_LIBRARY_PATH=(\S+):\$LD_LIBRARY_PATH", done.stderr)
    assert fix, done.stderr
    subprocess.run(["bash", "-c", fix[1]], env={**os.environ, "HOME": str(tmp_path)}, check=True)
    folder = fix[2].replace("~", str(tmp_path))
    environment.variables["LD_LIBRARY_PATH"] = f"{folder}:{libraries}"
    environment.assert_works("MPICH")


def test_debians_open_mpi(environment: Environment, tmp_path: Path) -> None:
    usr = unpack("openmpi-bin", tmp_path)
    libraries = usr / "lib" / MULTIARCH
    own = libraries / "openmpi"
    environment.variables = {
        "LD_LIBRARY_PATH": str(libraries),
        "PATH": str(usr / "bin"),
        "OPAL_PREFIX": str(usr),  # it was built to lie elsewhere
        "OPAL_LIBDIR": str(own / "lib"),
        "OPAL_DATADIR": str(usr / "share"),
        "OPAL_PKGDATADIR": str(usr / "share" / "openmpi"),
        "OPAL_SYSCONFDIR": str(usr.parent / "etc"),
        "OMPI_MCA_mca_base_component_path": str(own / "lib" / "openmpi3"),
    }
    environment.assert_works("Open MPI v4")


def test_intel_mpi(environment: Environment) -> None:
    """Of the extra ``impi``."""
    pip = [environment.bin / "python", "-m", "pip", "--disable-pip-version-check", "--quiet"]
    done = subprocess.run([*pip, "install", "impi-rt"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"impi-rt cannot be installed: {done.stderr.strip()[-200:]}")
    environment.assert_works("Intel(R) MPI Library")
