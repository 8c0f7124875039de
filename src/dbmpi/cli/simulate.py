"""``dbmpi simulate``: train with many replicas in virtual time, in one process."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from dbmpi.cli import options
from dbmpi.cli.train import described, exit_code, print_result

if TYPE_CHECKING:
    from dbmpi.machine.signals import StopSignal

SUMMARY = "train with many replicas in virtual time, in this process: real gradients and updates, without a cluster"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its `parser`."""
    options.add_configuration(
        parser, "description of the run; its [simulation] says how long everything takes", "topology.replicas=200"
    )


def run(arguments: argparse.Namespace) -> int:
    """Simulate with these `arguments`, print the result, and return the exit code."""
    from dbmpi.machine.signals import StopSignal

    # As in training, a signal that comes while libraries are loaded ends the run, and not the process.
    with StopSignal() as stop:
        return _simulate(arguments, stop)


def _simulate(arguments: argparse.Namespace, stop: StopSignal) -> int:
    from dbmpi.mpi import world

    with world.ranks() as comm:
        run = described(arguments, comm)
        from dbmpi.runs.simulation import simulate

        began = time.monotonic()
        result = simulate(run, stop, comm=comm)
    seconds = time.monotonic() - began
    if comm.rank == 0:
        print_result(result, run.run.directory, {"computed in": f"{seconds:.1f} s; the times below are virtual"})
    return exit_code(result)
