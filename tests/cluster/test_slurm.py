"""jobs/slurm/train.sbatch on a real Slurm, edited and submitted as a user would do it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster.slurm import Job, Slurm, skip_if_stopped, wait_until
from harness.environment import mpi_environment

SCRIPT = Path(__file__).parents[2] / "jobs" / "slurm" / "train.sbatch"
SHORT = ("--set", "optimizer.epochs=20", "--set", "monitor.evaluate_epochs=0")
ENDLESS = ("--set", "optimizer.epochs=100000", "--set", "monitor.evaluate_epochs=0")

pytestmark = pytest.mark.timeout(150)


class Submission:
    """The script, edited for three nodes of one rank; jobs that a test leaves behind are cancelled."""

    def __init__(self, slurm: Slurm, place: Path) -> None:
        self._slurm = slurm
        self._jobs: list[Job] = []
        self.script = place / "train.sbatch"
        self.name = f"dbmpi-test-{place.parent.name}"
        environment = place / "activate"
        environment.write_text(f'PATH="{Path(sys.executable).parent}:$PATH"\n', encoding="utf-8")
        self._text = SCRIPT.read_text(encoding="utf-8")
        self.edit(r"#SBATCH --job-name=.*", f"#SBATCH --job-name={self.name}")
        self.edit(r"#SBATCH --nodes=.*", "#SBATCH --nodes=3")
        self.edit(r"#SBATCH --ntasks-per-node=.*", "#SBATCH --ntasks-per-node=1")
        self.edit(r"#SBATCH --cpus-per-task=.*", "#SBATCH --cpus-per-task=1")
        self.edit(r"#SBATCH --time=.*", "#SBATCH --time=00:10:00")
        self.edit(r"activate=\S+", f"activate={environment}")
        if slurm.plugin == "pmix":
            self.edit(r"# export PMIX_MCA_psec=native", "export PMIX_MCA_psec=native")

    def edit(self, pattern: str, replacement: str) -> None:
        self._text, count = re.subn(rf"^{pattern}", replacement, self._text, flags=re.MULTILINE)
        assert count == 1, pattern

    def __call__(self, *arguments: str) -> Job:
        self.script.write_text(self._text, encoding="utf-8")
        job = self._slurm.submit(self.script, *arguments)
        self._jobs.append(job)
        return job

    @property
    def log(self) -> str:
        path = self.script.with_name(f"{self.name}.log")
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def end(self) -> None:
        for job in self._jobs:
            job.cancel()
        wait_until(lambda: all(job.state() not in ("RUNNING", "COMPLETING") for job in self._jobs), 15)


@pytest.fixture
def submit(slurm: Slurm, place: Path) -> Iterator[Submission]:
    submission = Submission(slurm, place)
    yield submission
    submission.end()


def accuracy(log: str) -> float:
    found = re.findall(r"test accuracy +([\d.]+) %  \(", log)
    assert found, log
    return float(found[-1])


def steps(log: str, pattern: str) -> int:
    found = re.findall(pattern, log)
    assert found, log
    return int(found[-1].replace(",", ""))


@pytest.mark.parametrize("way", ["srun", "mpirun"])
def test_learns_on_three_nodes(slurm: Slurm, submit: Submission, way: str) -> None:
    if way == "mpirun":
        submit.edit("plugin=auto", "plugin=mpirun")
    ended = submit(*SHORT).wait(100)
    assert (ended.state, ended.code) == ("COMPLETED", 0), submit.log
    assert f": 3 ranks by {slurm.plugin if way == 'srun' else 'mpirun'}\n" in submit.log
    assert "3 ranks: 1 shard" in submit.log
    assert accuracy(submit.log) >= 95, submit.log


@pytest.mark.parametrize("way", ["srun", "mpirun"])
def test_ends_with_a_checkpoint_when_warned_and_goes_on_when_submitted_again(
    submit: Submission, place: Path, way: str
) -> None:
    if way == "mpirun":
        submit.edit("plugin=auto", "plugin=mpirun")
    first = submit(*ENDLESS)
    assert wait_until(lambda: "samples/s" in submit.log, 60), submit.log
    first.warn()
    ended = first.wait(60)
    assert (ended.state, ended.code) == ("FAILED", 140), submit.log
    assert "the run ends after the current steps" in submit.log
    (checkpoint,) = (place / "runs" / "digits" / "checkpoints").glob("step-*.h5")
    done = int(checkpoint.stem.partition("-")[2])
    assert done == steps(submit.log, r" steps +([\d,]+) in")

    # 45 steps are an epoch: so that some are left, wherever the first job was stopped.
    ended = submit("--set", f"optimizer.epochs={done // 45 + 15}", "--set", "monitor.evaluate_epochs=0").wait(100)
    assert (ended.state, ended.code) == ("COMPLETED", 0), submit.log
    assert steps(submit.log, r"going on after ([\d,]+) steps") == done
    assert len(re.findall(r"^\S+ \S+ job \d+ on ", submit.log, re.MULTILINE)) == 2, "the log is not appended to"
    assert accuracy(submit.log) >= 95, submit.log


@pytest.mark.parametrize("nodes", [1, 2])
def test_worlds_of_one_rank_are_refused(slurm: Slurm, place: Path, nodes: int) -> None:
    command = ["srun", "--quiet", "--mpi=none", f"--nodes={nodes}", "--ntasks=2", "--immediate=20", "--time=2"]
    done = subprocess.run(
        [*command, sys.executable, "-m", "dbmpi", "train", "train.toml"],
        cwd=place,
        env=mpi_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    skip_if_stopped()
    if "Unable to allocate resources" in done.stderr:
        pytest.skip("other jobs use the nodes")
    assert done.returncode == 2, done.stderr
    messages = [line for line in done.stderr.splitlines() if line.startswith("dbmpi")]
    assert len(messages) == 1, done.stderr
    assert "each of them is a world of its own" in messages[0]
    assert f"srun --mpi={slurm.plugin}" in messages[0]
    assert not (place / "runs").exists()


def test_the_test_for_accuracy_can_fail() -> None:
    report: Callable[[str], str] = " test accuracy  {} %  (1 of 359)\n".format
    assert accuracy(report("12.50") + report("97.49")) == 97.49
    with pytest.raises(AssertionError):
        accuracy("epoch 20   test accuracy 97.49 %   359 samples")
