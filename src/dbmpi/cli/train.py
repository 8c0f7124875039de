"""``dbmpi train``: train a network under mpirun, srun, or alone."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "train the network that a configuration describes (under mpirun or srun, or alone)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("config", type=Path, metavar="CONFIG.toml", help="description of the run")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help="override a setting of the file, e.g. optimizer.epochs=5 (may be repeated)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Train and print what came out."""
    from dbmpi import config

    described = config.load(arguments.config, tuple(arguments.overrides))

    # Threads, BLAS kernel and kernel cache are chosen before NumPy and Numba are loaded.
    from dbmpi.runtime.environment import prepare

    chosen = prepare()

    from dbmpi.errors import RunFailed, UserError
    from dbmpi.runtime import world

    comm = world.start()
    if comm.rank == 0:
        print(chosen, flush=True)
    from dbmpi.train import train

    try:
        result = train(described, comm)
    except (UserError, KeyboardInterrupt):
        raise
    except (RunFailed, Exception) as error:
        # The other ranks wait for this one: end them too, with this rank's traceback.
        world.report_and_abort(error)
        raise
    if comm.rank == 0:
        _print(result, described.run.directory)
    return 128 + result.stopped_by if result.stopped_by else 0


def _print(result: object, directory: Path) -> None:
    from dbmpi.train import Result

    assert isinstance(result, Result)
    lines = []
    if result.test is not None:
        accuracy = result.test.accuracy
        lines.append(("test loss", f"{result.test.mean_loss:.4f}"))
        if accuracy is not None:
            lines.append(
                ("test accuracy", f"{100 * accuracy:.2f} %  ({result.test.correct:,} of {result.test.samples:,})")
            )
    lines += [
        ("steps", f"{result.steps:,} in {result.seconds:.1f} s"),
        ("samples/s", f"{result.samples / max(result.seconds, 1e-9):,.0f}"),
        ("mean staleness", f"{result.staleness:.2f}"),
        ("checkpoint", str(result.checkpoint)),
        ("records", str(directory / "records")),
    ]
    for name, value in lines:
        print(f"{name:>14}  {value}", flush=True)
