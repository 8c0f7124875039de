"""Two jobs in one run directory: the second is refused, unless the first one is dead."""

from __future__ import annotations

import json
import os
import re
import signal

from failure.jobs import FOR_EVER, Jobs, messages

OFTEN = "checkpoint.every_seconds=0.1"
ALWAYS = f"optimizer.epochs={FOR_EVER}"


def locks(jobs: Jobs) -> list[str]:
    return [name for name in os.listdir(jobs.run_directory) if name.startswith("in-use")]


def test_a_second_job_is_refused_and_the_first_goes_on(jobs: Jobs) -> None:
    first = jobs.start(3, OFTEN, ALWAYS)
    jobs.wait_until_all_learn(first, 2)
    jobs.wait_for_checkpoint(first)
    second = jobs(2, ALWAYS)
    assert second.returncode == 2, second.transcript
    (told,) = messages(second)
    assert re.search(rf"run: is in use by process {first.ranks()[0]} on .* since 20", told), told
    assert f"kill {first.ranks()[0]}" in told
    jobs.wait_for_reports(first, 0, 1, count=2)
    first.signal(signal.SIGTERM, 1)
    done = jobs.finish(first)
    assert done.returncode == 128 + signal.SIGTERM, done.transcript
    assert locks(jobs) == []
    jobs.assert_whole()
    assert len(list((jobs.run_directory / "checkpoints").glob("step-*.h5"))) == 2


def test_a_job_that_was_killed_is_followed_at_once(jobs: Jobs) -> None:
    program = jobs.start(3, OFTEN, ALWAYS)
    jobs.wait_until_all_learn(program, 2)
    jobs.wait_for_checkpoint(program)
    program.send(program.ranks().values(), signal.SIGKILL)
    jobs.finish(program)
    assert locks(jobs) == ["in-use.1.json"]
    jobs.assert_resumes()


def test_a_mistake_releases_the_directory(trained: Jobs) -> None:
    done = trained(2, "checkpoint.resume=never")
    assert done.returncode == 2, done.transcript
    assert locks(trained) == []


def test_a_job_that_has_lost_its_directory_writes_nothing_any_more(jobs: Jobs) -> None:
    """As one that was halted for long finds it."""
    program = jobs.start(3, OFTEN, ALWAYS)
    jobs.wait_until_all_learn(program, 2)
    jobs.wait_for_checkpoint(program)
    other = {"host": "elsewhere", "process": 77, "since": "2026-01-02", "token": "theirs", "renewals": "0"}
    (jobs.run_directory / "in-use.2.json").write_text(json.dumps(other))
    done = jobs.finish(program)
    assert done.returncode == 1, done.transcript
    (told,) = messages(done)
    assert "run: has been taken over by process 77 on elsewhere since 2026-01-02" in told
    assert "Traceback" not in done.output, done.transcript
    assert "in-use.2.json" in locks(jobs)
    assert not list((jobs.run_directory / "checkpoints").glob(".*.tmp"))
