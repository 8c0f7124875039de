"""Every way into a run at the same speed: samples/s of one run by the command line and from Python, in turn.

The run is the same each time: a dense network on random samples, by ``dbmpi train``, by ``dbmpi.train`` in a script, by
the same script under ``dbmpi launch -- python``, by one that loads NumPy first, and by one that loads Numba first, too.
Except for ``launch`` they are started on one rank without a launcher, and on four (with ``--quick`` on two) under
mpirun.  What is compared is the run's own samples/s (`Result`), so that starting and compiling do not count; the
kernels are compiled before.  A script that loaded NumPy first need not be as fast if a line has said what is lost.
With ``--quick`` each way is tried once, which on a busy machine says little about a ratio.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common

RANKS, QUICK_RANKS = (1, 4), (1, 2)
LEAST = 0.9
FEATURES, UNITS, CLASSES = 256, 512, 10
SAMPLES, BATCH_SIZE, EPOCHS = 8192, 64, 4
QUICK_EPOCHS = 1
COMMAND = "dbmpi train"
LAUNCH = "dbmpi launch -- python"
WAYS = {
    "dbmpi.train in a script": "",
    "NumPy loaded before": "import numpy",
    "NumPy and Numba loaded before": "import numba, numpy",
}
LOST = "slower than it could be"
SCRIPT = """
import sys
{before}
import dbmpi

result = dbmpi.train(dbmpi.load(sys.argv[1], ("run.directory=" + sys.argv[2],)))
print("samples/s", result.samples / result.seconds)
"""


def main() -> None:
    options = common.options(__doc__)
    report = common.Report("entry", options.json)
    for ranks in QUICK_RANKS if options.quick else RANKS:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            configuration = describe(folder, QUICK_EPOCHS if options.quick else EPOCHS)
            measure: dict[str, Any] = {COMMAND: functools.partial(run, ranks, configuration, ("-m", "dbmpi", "train"))}
            for number, (name, before) in enumerate(WAYS.items()):
                script = folder / f"way{number}.py"
                script.write_text(SCRIPT.format(before=before))
                measure[name] = functools.partial(run, ranks, configuration, (str(script),))
            launch = ("-m", "dbmpi", "launch", "-n", str(ranks), "--", "python", str(folder / "way0.py"))
            measure[LAUNCH] = functools.partial(run, ranks, configuration, launch)
            if options.quick:
                measure[COMMAND]()  # compiles the kernels
                found = {name: [common.undisturbed(once)] for name, once in measure.items()}
            else:
                found = common.in_turn(9, **measure)
        compare(report, ranks, found)
    report.finish()


def compare(report: common.Report, ranks: int, found: dict[str, list[Any]]) -> None:
    """Add a table, and for each way the target that it reaches the command's speed, or says why it does not."""
    speeds = {name: [speed for speed, _ in runs] for name, runs in found.items()}
    own = common.median(speeds[COMMAND])
    rows, notes = [], []
    for name, values in speeds.items():
        share = common.median(values) / own
        losses = sorted({line for _, lines in found[name] for line in lines})
        rows.append((name, common.median(values), common.spread(values), share, "yes" if losses else "-"))
        notes += [f"  {name}: {line.partition(f'{LOST}: ')[2]}" for line in losses]
        if name != COMMAND:
            excused = "before" in name and losses
            what = f"share of the command's samples/s, {name}, ranks: {ranks}"
            report.at_least(what + (" (which says what is lost)" if excused else ""), share, 0 if excused else LEAST)
    header = ("way in", "samples/s", "quartiles", "of the command's", "says what is lost")
    report.table(f"{ranks} rank{'s' if ranks > 1 else ''}, in turn (medians)", header, rows)
    print(*notes, sep="\n", flush=True)


def run(ranks: int, configuration: Path, program: tuple[str, ...]) -> tuple[float, list[str]]:
    """Start a program on the ranks; return samples/s, and the lines on what is lost."""
    with tempfile.TemporaryDirectory(dir=configuration.parent) as place:
        script = program[-1].endswith(".py")
        directory = (f"{place}/run",) if script else ("--set", f"run.directory={place}/run")
        words = (*program, str(configuration), *directory)
        alone = ranks == 1 or "launch" in program
        command = (sys.executable, *words) if alone else common.on_ranks(ranks, *words)
        environment = {name: value for name, value in os.environ.items() if name not in common.THREAD_VARIABLES}
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, check=False
        )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {done.returncode}: {done.stderr}")
    speeds = [line.split()[1] for line in done.stdout.splitlines() if line.strip().startswith("samples/s")]
    return float(speeds[0].replace(",", "")), [line for line in done.stderr.splitlines() if LOST in line]


def describe(folder: Path, epochs: int) -> Path:
    """Write random samples and the configuration of the run; return its path."""
    write = f"""
import h5py, numpy as np
random = np.random.default_rng(1)
with h5py.File({str(folder / "train.h5")!r}, "w") as file:
    file["inputs"] = random.normal(size=({SAMPLES}, {FEATURES})).astype(np.float32)
    file["targets"] = random.integers(0, {CLASSES}, {SAMPLES})
    file["targets"].attrs["classes"] = {CLASSES}
"""
    subprocess.run([sys.executable, "-c", write], check=True)
    configuration = folder / "run.toml"
    configuration.write_text(
        f'[data]\ntrain = {json.dumps(str(folder / "train.h5"))}\n[run]\ndirectory = "run"\n'
        f'[network]\nloss = "softmax"\n[[network.layers]]\nunits = {UNITS}\nactivation = "relu"\n'
        f"[[network.layers]]\nunits = {CLASSES}\n"
        f'[optimizer]\nbatch_size = {BATCH_SIZE}\nepochs = {epochs}\n[monitor]\nprogress = "none"\n'
    )
    return configuration


if __name__ == "__main__":
    main()
