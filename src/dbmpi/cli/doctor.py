"""``dbmpi doctor``: check the machine, and report anything that would break a run or slow it down."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dbmpi.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dbmpi.machine.doctor import Finding

SUMMARY = "check Python, BLAS, Numba, HDF5, MPI and the machine, and report what would break or slow down a run"

_COLOURS = {"ok": "green", "note": "yellow", "broken": "red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its `parser`."""
    parser.add_argument(
        "--objective",
        type=Path,
        metavar="CONFIG.toml",
        help="check the gradient of a configuration's [objective] by differences of its loss, instead of the machine",
    )
    parser.add_argument(
        "--map",
        type=Path,
        metavar="CONFIG.toml",
        help="under mpirun or srun, show which part of a configuration's [topology] each host would get",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Print all findings as these `arguments` say; return 1 if something is broken.

    Under mpirun or srun only the world is looked at: that the ranks which were started are one world, which of them are
    on which host, and how hosts reach each other's memory.
    """
    from dbmpi.machine.rank_variables import launched

    if arguments.objective is not None:
        from dbmpi.config.reading import read
        from dbmpi.runs.gradient_check import check_gradient

        if launched(os.environ)[2] > 0:  # the first rank says it for all
            return 0
        checked = read(arguments.objective)
        return _concluded(check_gradient(checked), "the gradient fits the loss", as_json=arguments.json)
    from dbmpi.machine.doctor import diagnose

    ranks, by, _ = launched(os.environ)
    if ranks > 1:
        return _look_at_world(by, arguments.map)
    if arguments.map is not None:
        raise UserError(
            "--map shows ranks on hosts, and there is one process: start it as the run, under mpirun or srun"
        )
    return _concluded(diagnose(), "everything that a run needs works", as_json=arguments.json)


def _look_at_world(by: str, configuration: Path | None) -> int:
    """Print what the launcher has started, as it is on its hosts (collective); return the exit code."""
    from dbmpi.config import TopologySection
    from dbmpi.config.reading import load
    from dbmpi.mpi import topology, transport, window, world
    from dbmpi.mpi.host_placement import host_map, host_names, ranks_by_position, spans

    with world.ranks() as comm:
        section = TopologySection()
        with world.together(comm, "planning the topology"):
            if configuration is not None:
                section = load(configuration).topology
            plan = topology.plan(section, comm.size)
        hosts = window.hosts(comm)
        order, names = ranks_by_position(plan, hosts), host_names(comm, hosts)
        if comm.rank == 0:
            print(f"{by} started one world of {comm.size} ranks; run doctor by itself to check the rest")
            lines = host_map(plan, order, hosts[list(order)], names)
            if configuration is None:
                lines = (f"{names[host]}: ranks {spans((hosts == host).nonzero()[0].tolist())}" for host in names)
            for line in lines:
                print(line)
        if len(set(hosts.tolist())) > 1:
            _, line = transport.choose(comm, hosts)
            if comm.rank == 0:
                print(line)
    return 0


def _concluded(diagnosis: Iterator[Finding], good: str, *, as_json: bool) -> int:
    """Print all findings of a diagnosis, and in the end what is broken, or that all is `good`; return the exit code."""
    findings = list(_shown(diagnosis, quiet=as_json))
    broken = [finding.what for finding in findings if finding.status == "broken"]
    if as_json:
        print(json.dumps({"ok": not broken, "findings": [asdict(finding) for finding in findings]}))
    elif broken:
        print(f"broken: {', '.join(broken)}")
    else:
        print(good)
    return 1 if broken else 0


def _shown(findings: Iterator[Finding], *, quiet: bool) -> Iterator[Finding]:
    """Pass findings on and print each as it comes, in colours on a terminal."""
    if quiet:
        yield from findings
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=sys.stdout)
    for finding in findings:
        advice = f"-> {finding.advice}" if finding.advice else ""
        if console.is_terminal:
            grid = Table.grid(padding=(0, 2))
            for width in (6, 14):
                grid.add_column(width=width)
            grid.add_column()
            grid.add_row(
                Text(finding.status, _COLOURS[finding.status]), finding.what, Text(f"{finding.found}\n{advice}".strip())
            )
            console.print(grid)
        else:
            print(f"{finding.status:<8}{finding.what:<14}  {finding.found}  {advice}".rstrip(), flush=True)
        yield finding
