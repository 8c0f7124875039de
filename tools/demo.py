"""The demo (``make demo``): learn handwritten digits with Downpour SGD on four ranks, and say what came out.

Runs the commands that a user would type, each printed before it starts.  Fails if the network has not learned.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from dbmpi.checkpoint.directory import read_pointer
from dbmpi.monitor import history

DATA = Path("data")
RUN = Path("runs/demo")
LEAST_ACCURACY = 0.96


def main() -> int:
    """Run the demo from the project's directory; return the exit code."""
    started = time.monotonic()
    shutil.rmtree(RUN, ignore_errors=True)
    commands = (
        ("data", "import", "digits", "--out", str(DATA), "--force"),
        ("launch", "-n", "4", "--", "train", "examples/digits.toml", "--set", f"run.directory={RUN}"),
        ("plot", str(RUN)),
    )
    for command in commands:
        print(f"\n$ dbmpi {shlex.join(command)}", flush=True)
        code = subprocess.run([sys.executable, "-m", "dbmpi", *command], check=False).returncode
        if code:
            print(f"\ndemo: 'dbmpi {command[0]}' ended with exit code {code}", file=sys.stderr)
            return 1
    return report(time.monotonic() - started)


def report(seconds: float) -> int:
    """Print the results of the run; return 1 if they are not what the demo promises."""
    result = history.summary(RUN)
    checkpoint = read_pointer(RUN / "checkpoints")
    picture = RUN / "plots" / "run.png"
    accuracy = result.test_accuracy or 0.0
    print(f"\nThe demo took {seconds:.0f} s.\n")
    for name, value in (
        ("test accuracy", f"{100 * accuracy:.2f} %"),
        ("samples/s", f"{result.samples_per_second:,.0f}"),
        ("mean staleness", f"{result.mean_staleness:.2f}"),
        ("checkpoint", checkpoint or "none"),
        ("records", RUN / "records"),
        ("plot", picture if picture.exists() else "none"),
    ):
        print(f"{name:>14}  {value}")
    problems = []
    if accuracy < LEAST_ACCURACY:
        problems.append(f"the test accuracy is below {100 * LEAST_ACCURACY:.0f} %")
    if checkpoint is None or not checkpoint.exists():
        problems.append("there is no checkpoint")
    if not picture.exists():
        problems.append("there is no plot")
    for problem in problems:
        print(f"demo: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
