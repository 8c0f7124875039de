"""The scripts of jobs/slurm, and dbmpi submit, on a real Slurm: edited, submitted, warned and resumed as by a user."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from cluster.slurm import Job, Slurm, skip_if_stopped, wait_until
from harness.environment import mpi_environment, timeout_scale

SCRIPTS = Path(__file__).parents[2] / "jobs" / "slurm"
SHORT = ("--set", "optimizer.epochs=20", "--set", "monitor.evaluate_epochs=0")
SLOW = ("--set", "optimizer.epochs=10", "--set", "monitor.evaluate_epochs=0", "--set", "data.transform=slow:slowly")
"""Runs of which there is something left when they are warned: mostly, they sleep."""
SERIAL = ("--set", "topology.shards=1", "--set", "topology.replicas=1", "--set", "server.overlap=none")
"""One replica, whose results do not depend on timing."""
SLOWLY = """
import os, time
def slowly(batch, random):
    time.sleep(float(os.environ.get("SLOWLY", "0.1")))
    return batch
"""

pytestmark = pytest.mark.timeout(150)


class Submission:
    """A script, edited for one core a rank; jobs that a test leaves behind are cancelled."""

    def __init__(self, slurm: Slurm, place: Path) -> None:
        self._slurm, self._place = slurm, place
        self._jobs: list[Job] = []
        self.name = f"dbmpi-test-{place.parent.name}"
        (place / "slow.py").write_text(SLOWLY, encoding="utf-8")
        (place / "activate").write_text(f'PATH="{Path(sys.executable).parent}:$PATH"\n', encoding="utf-8")

    def script(self, name: str, nodes: int = 3, time: str = "00:10:00") -> None:
        """Choose and edit one of the scripts."""
        self._text = (SCRIPTS / f"{name}.sbatch").read_text(encoding="utf-8")
        self.edit(r"#SBATCH --job-name=.*", f"#SBATCH --job-name={self.name}")
        self.edit(r"#SBATCH --nodes=(?!1$).*", f"#SBATCH --nodes={nodes}", some=True)
        self.edit(r"#SBATCH --ntasks-per-node=.*", f"#SBATCH --ntasks-per-node={1 if nodes > 1 else 3}")
        self.edit(r"#SBATCH --cpus-per-task=.*", "#SBATCH --cpus-per-task=1")
        self.edit(r"#SBATCH --mem=.*", "#SBATCH --mem=1G", some=True)
        self.edit(r"#SBATCH --time=.*", f"#SBATCH --time={time}")
        self.edit(r"source \S+", f"source {self._place / 'activate'}")
        if self._slurm.plugin == "pmi2":
            self.edit(r" *srun --mpi=pmix", "  srun --mpi=pmi2", some=True)

    def edit(self, pattern: str, replacement: str, *, some: bool = False) -> None:
        self._text, count = re.subn(rf"^{pattern}", replacement, self._text, flags=re.MULTILINE)
        assert count >= 1 or some, pattern

    def __call__(self, *arguments: str) -> Job:
        path = self._place / "job.sbatch"
        path.write_text(self._text, encoding="utf-8")
        return self.follow(self._slurm.submit(path, *arguments))

    def follow(self, job: Job) -> Job:
        """Cancel a job at the end, too, that was submitted otherwise."""
        self._jobs.append(job)
        return job

    @property
    def log(self) -> str:
        logs = sorted(self._place.glob("*.log"))
        return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in logs)

    def end(self) -> None:
        for job in self._jobs:
            job.cancel()
        wait_until(lambda: all(job.state() not in ("RUNNING", "COMPLETING") for job in self._jobs), 15)


@pytest.fixture
def submit(slurm: Slurm, place: Path) -> Iterator[Submission]:
    submission = Submission(slurm, place)
    yield submission
    submission.end()


def dbmpi(place: Path, *words: str) -> str:
    """Return what a command of dbmpi prints, typed in a directory."""
    done = subprocess.run(
        [sys.executable, "-m", "dbmpi", *words],
        cwd=place,
        env=mpi_environment(),
        capture_output=True,
        text=True,
        timeout=60 * timeout_scale(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def accuracy(log: str) -> float:
    found = re.findall(r"test accuracy +([\d.]+) %  \(", log)
    assert found, log
    return float(found[-1])


def parameters(place: Path) -> dict[str, np.ndarray]:
    """Return the parameters in the last checkpoint of the digits' run."""
    found: dict[str, np.ndarray] = {}

    def take(name: str, entry: object) -> None:
        if isinstance(entry, h5py.Dataset) and entry.dtype.kind == "f" and entry.size:
            found[name] = entry[()]

    with h5py.File(place / "runs" / "digits" / "checkpoints" / "latest") as file:
        file["parameters"].visititems(take)
    assert found
    return found


@pytest.mark.parametrize("name", ["train", "srun", "mpirun", "one-node"])
def test_learns(slurm: Slurm, submit: Submission, name: str) -> None:
    submit.script(name, 1 if name == "one-node" else 3)
    ended = submit(*SHORT).wait(100)
    assert (ended.state, ended.code) == ("COMPLETED", 0), submit.log
    assert "3 ranks: 1 shard" in submit.log
    assert name != "train" or f"3 ranks by {slurm.plugin}\n" in submit.log
    assert accuracy(submit.log) >= 95, submit.log


@pytest.mark.parametrize(
    ("name", "number", "batch"),
    [("srun", "USR2", True), ("mpirun", "USR1", True), ("srun", "USR1", False)],
    ids=["USR2 to the script", "USR1 to the script", "USR1 to the ranks"],
)
def test_a_warned_job_is_requeued_and_continues(submit: Submission, name: str, number: str, batch: bool) -> None:
    submit.script(name, 2)
    job = submit(*SLOW)
    assert wait_until(lambda: "samples/s" in submit.log, 60), submit.log
    job.signal(number, batch=batch)
    assert wait_until(lambda: job.restarts() == 1, 60), submit.log
    ended = job.wait(100)
    assert (ended.state, ended.code) == ("COMPLETED", 0), submit.log
    assert submit.log.count("the run ends after the current steps") == 1
    assert "requeued 1 times" in submit.log
    assert len(re.findall(r"going on after [\d,]+ steps", submit.log)) == 1
    assert accuracy(submit.log) >= 95, submit.log


@pytest.mark.timeout(300)
def test_a_job_that_comes_to_its_limit_has_the_result_of_an_undisturbed_one(
    submit: Submission, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is one minute, and Slurm warns as soon as less than 40 s are left; so it is requeued a few times."""
    epochs = (
        "--set",
        "optimizer.epochs=4",
        "--set",
        "monitor.evaluate_epochs=0",
        "--set",
        "data.transform=slow:slowly",
    )
    submit.script("srun", 2, "00:02:00")
    submit.edit(r"#SBATCH --signal=.*", "#SBATCH --signal=B:USR2@60")
    job = submit(*epochs, *SERIAL)
    ended = job.wait(250)
    assert (ended.state, ended.code) == ("COMPLETED", 0), submit.log
    assert job.restarts() >= 1, submit.log
    disturbed = parameters(place)
    (place / "runs" / "digits").rename(place / "runs" / "disturbed")
    monkeypatch.setenv("SLOWLY", "0")
    submit.edit(r"#SBATCH --time=.*", "#SBATCH --time=00:10:00")
    ended = submit(*epochs, *SERIAL).wait(100)
    assert (ended.state, ended.code) == ("COMPLETED", 0), submit.log
    undisturbed = parameters(place)
    assert disturbed.keys() == undisturbed.keys()
    for key, values in undisturbed.items():
        np.testing.assert_array_equal(disturbed[key], values)


def test_terminated_jobs_stay_ended_and_continue_when_submitted_again(submit: Submission, place: Path) -> None:
    submit.script("train", 2)
    job = submit(*SLOW)
    assert wait_until(lambda: "samples/s" in submit.log, 60), submit.log
    job.signal("TERM", batch=True)
    ended = job.wait(60)
    assert (ended.state, ended.code) == ("FAILED", 140), submit.log
    assert job.restarts() == 0
    (checkpoint,) = (place / "runs" / "digits" / "checkpoints").glob("step-?????????.h5")
    done = int(checkpoint.stem.partition("-")[2])
    ended = submit(*SLOW).wait(100)
    assert (ended.state, ended.code) == ("COMPLETED", 0), submit.log
    assert f"going on after {done:,} steps" in submit.log
    assert submit.log.count(" times\n") == 2, "the log is not appended to"


def test_a_heterogeneous_job_has_its_shards_in_the_first_component(submit: Submission, place: Path) -> None:
    submit.script("heterogeneous", 2)
    wrapper = place / "dbmpi"
    wrapper.write_text(
        f'#!/bin/bash\necho "rank $SLURM_PROCID on $SLURMD_NODENAME"\nexec {sys.executable} -m dbmpi "$@"\n'
    )
    wrapper.chmod(0o755)
    submit.edit(r"source \S+", f"PATH={place}:$PATH  #")
    submit.edit(r"#SBATCH --ntasks-per-node=1\n#SBATCH --cpus-per-task=1\n#SBATCH --mem=1G\n#SBATCH hetjob",
                "#SBATCH --ntasks-per-node=2\n#SBATCH --cpus-per-task=1\n#SBATCH --mem=1G\n#SBATCH hetjob")  # fmt: skip
    ended = submit(*SHORT).wait(100)
    assert (ended.state, ended.code) == ("COMPLETED", 0), submit.log
    assert "4 ranks: 2 shards on separate ranks, 2 replicas" in submit.log
    assert accuracy(submit.log) >= 95, submit.log
    nodes = [{node for rank, node in re.findall(r"^rank (\d) on (\S+)", submit.log, re.MULTILINE) if rank in ranks}
             for ranks in ("01", "23")]  # fmt: skip
    assert [len(each) for each in nodes] == [1, 2], submit.log
    assert nodes[0].isdisjoint(nodes[1])


def test_an_array_ends_in_one_table(submit: Submission, place: Path) -> None:
    submit.script("array", 1)
    submit.edit(r"#SBATCH --array=.*", "#SBATCH --array=0-1")
    submit.edit(r"values=\(.*\)", "values=(0.003 0.02)")
    ended = submit(*SHORT).wait(140)
    assert (ended.state, ended.code) == ("COMPLETED", 0), submit.log
    runs = sorted(str(path.relative_to(place)) for path in (place / "runs").iterdir())
    assert runs == ["runs/learning_rate-0.003", "runs/learning_rate-0.02"]
    _, *rows = dbmpi(place, "status", *runs).splitlines()
    assert [row.split()[0] for row in rows] == runs
    assert all(" complete " in row and " COMPLETED " in row and "20/20" in row for row in rows)


def test_a_run_is_submitted_followed_warned_and_resumed(slurm: Slurm, submit: Submission, place: Path) -> None:
    words = ("submit", "train.toml", "--nodes", "2", "--ranks-per-node", "1", "--time", "10", "--name", submit.name)
    out = dbmpi(place, *words, *SLOW)
    (number,) = re.findall(r"submitted job (\d+)", out)
    job = submit.follow(slurm.started(number))
    assert wait_until(lambda: "samples/s" in submit.log, 60), submit.log
    (shown,) = json.loads(dbmpi(place, "status", "--json", "runs/digits"))
    assert (shown["state"], shown["job"]["number"], shown["starts"]) == ("running", number, 1)
    job.signal("USR2", batch=True)
    assert wait_until(lambda: job.restarts() == 1, 60), submit.log
    ended = job.wait(100)
    assert (ended.state, ended.code) == ("COMPLETED", 0), submit.log
    assert accuracy(submit.log) >= 95, submit.log
    (shown,) = json.loads(dbmpi(place, "status", "--json", "runs/digits"))
    assert (shown["state"], shown["job"]["state"], shown["starts"]) == ("complete", "COMPLETED", 2)


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
