"""Several hosts on this machine: network namespaces with TCP between them, whose links can fail and be slow.

The scripts that make them stand beside the project (../shared/cluster), or where DBMPI_TEST_CLUSTER says.  All runs on
this machine share the hosts: only one at a time may disturb their links.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from harness.environment import is_open_mpi

SCRIPTS = Path(os.environ.get("DBMPI_TEST_CLUSTER", Path(__file__).parents[3] / "shared" / "cluster"))
RATE = "20mbit"
"""What a limited link lets through in a second, as ``tc`` has it."""
SECONDS = 20.0
"""In which a command on hosts and links must end."""


class NoHostsError(Exception):
    """There can be no hosts here; the message says why."""


@contextmanager
def hosts(count: int = 3) -> Iterator[list[str]]:
    """Yield the names of so many hosts.  Those that are up already are used and left; else they are made and removed.

    Raises
    ------
    NoHostsError
        If that is not possible here.
    """
    if not (SCRIPTS / "hosts.sh").exists():
        raise NoHostsError(f"needs hosts.sh, which makes hosts, in {SCRIPTS}, or where DBMPI_TEST_CLUSTER says")
    if os.geteuid() != 0:
        raise NoHostsError("needs root, to make virtual hosts")
    missing = [command for command in ("ip", "tc") if shutil.which(command) is None]
    if missing:
        raise NoHostsError(f"needs the commands ip and tc of iproute2, to make hosts; there is no {missing[0]}")
    names = [f"dbh{number}" for number in range(1, count + 1)]
    present = _run("ip", "netns", "list").stdout.split()
    if "dbswitch" in present:
        if not set(names) <= set(present):
            raise NoHostsError(f"the hosts that are up are fewer than {count}: remove them with hosts.sh down")
        yield names
        return
    made = _run("bash", str(SCRIPTS / "hosts.sh"), "up", str(count), check=False)
    try:
        if made.returncode != 0:
            raise NoHostsError(f"hosts.sh cannot make hosts here: {made.stderr.strip().splitlines()[-1:]}")
        yield names
    finally:
        _run("bash", str(SCRIPTS / "hosts.sh"), "down", check=False)


def spread(names: Sequence[str], slots: int = 1) -> tuple[list[str], dict[str, str]]:
    """Return options for the launcher, and variables, with which it puts so many ranks on each of these hosts."""
    rsh = str(SCRIPTS / "hosts-rsh")
    if is_open_mpi():
        options = ["--host", ",".join(f"{name}:{slots}" for name in names)]
        return options, {"PRTE_MCA_plm_ssh_agent": rsh, "OMPI_MCA_pml": "ob1", "OMPI_MCA_osc": "^ucx"}
    options = ["-launcher", "rsh", "-launcher-exec", rsh, "-hosts", ",".join(names), "-ppn", str(slots)]
    # UCX would find shared memory between these hosts.
    return options, {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp"}


def at(host: str, argv: Sequence[str], directory: Path) -> list[str]:
    """Return the command that runs `argv` on a host, in a directory."""
    return [str(SCRIPTS / "hosts-rsh"), host, f"cd {shlex.quote(str(directory))} && exec {shlex.join(argv)}"]


def is_on(pid: int, host: str) -> bool:
    """Return whether a process is on a host; one that has ended is not."""
    try:
        return os.path.samestat(os.stat(f"/proc/{pid}/ns/net"), os.stat(f"/run/netns/{host}"))
    except FileNotFoundError:
        return False


def set_link(host: str, state: str) -> None:
    """Let the link of a host be ``up`` or ``down``."""
    _run("ip", "-n", host, "link", "set", "veth0", state)


@contextmanager
def cut_between(one: str, other: str) -> Iterator[None]:
    """Let two hosts not reach each other in the block, as behind a firewall that drops what they send."""
    pairs = [(one, other), (other, one)]
    for here, there in pairs:
        entry = f"neigh replace {_address(there)} lladdr 02:00:00:00:00:01 dev veth0 nud permanent"
        _run("ip", "-n", here, *entry.split())
    try:
        yield
    finally:
        for here, there in pairs:
            _run("ip", "-n", here, "neigh", "del", _address(there), "dev", "veth0", check=False)


def _address(host: str) -> str:
    return f"10.77.0.{host.removeprefix('dbh')}"


def limit_link(host: str, rate: str = RATE, burst: str = "32kb") -> None:
    """Let no more leave a host than this, nor at once."""
    rule = f"dev veth0 root tbf rate {rate} burst {burst} latency 50ms"
    _run("ip", "netns", "exec", host, "tc", "qdisc", "replace", *rule.split())


def mend_link(host: str) -> None:
    """Let the link of a host be as it was made: up, and not limited."""
    set_link(host, "up")
    # It fails where nothing is limited.
    _run("ip", "netns", "exec", host, "tc", "qdisc", "del", "dev", "veth0", "root", check=False)


def _run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS, check=check
    )
