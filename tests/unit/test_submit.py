"""dbmpi submit and dbmpi status, with commands of Slurm that only write down how they were called."""

from __future__ import annotations

import argparse
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
from unit.run_records import make_run

from dbmpi.cli import submit
from dbmpi.cli.main import main
from dbmpi.config import TopologySection
from dbmpi.errors import UserError
from dbmpi.machine import mpi_library, slurm
from dbmpi.mpi.host_placement import ranks_by_position
from dbmpi.mpi.topology import needed, plan

CONFIGURATION = """
[data]
train = "train.h5"
[run]
directory = "runs/my run"
[[network.layers]]
type = "dense"
units = 2
"""
ASKED = {"nodes": 2, "ranks_per_node": None, "threads": 1, "memory": "", "shard_nodes": None, "shard_memory": ""}
ASKED |= {"partition": "", "constraint": "", "shard_partition": ""}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a configuration, in which Slurm's commands are those of ``bin``; there are none yet."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "train.toml").write_text(CONFIGURATION)
    (tmp_path / "train.h5").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/nowhere")
    monkeypatch.setattr(mpi_library, "loaded_library", lambda: ("MPICH Version: 5.0", ""))
    return tmp_path


def offer(site: Path, name: str, answer: str, code: int = 0) -> None:
    """Let a command of Slurm's give an answer."""
    path = site / "bin" / name
    path.write_text(
        f"#!/bin/sh\nprintf '%s\\n' \"$@\" >>'{site}/{name}.calls'\nprintf '%s\\n' '{answer}'\nexit {code}\n"
    )
    path.chmod(0o755)


def arranged(section: TopologySection, **asked):
    return submit.arrange(argparse.Namespace(**ASKED | asked), section)


# The ranks


def test_the_topology_says_how_many_ranks_there_are():
    numbers = (None, 1, 2, 3)
    for shards, replicas, partitions, colocate in itertools.product(numbers, numbers, numbers, (False, True)):
        section = TopologySection(shards=shards, replicas=replicas, partitions=partitions, colocate=colocate)
        fitting = []
        for world in range(2, 16):
            try:
                plan(section, world)
                fitting.append(world)
            except UserError:
                continue
        if needed(section) is not None and fitting:
            assert fitting == [needed(section)]
        elif needed(section) is None and not colocate:
            assert len(fitting) > 1


def test_ranks_are_spread_over_the_nodes():
    section = TopologySection(shards=2, replicas=3, partitions=2)
    (group,), made = arranged(section, nodes=3)
    assert (group.nodes, group.per_node, group.ranks, group.total) == (3, 3, 8, 8)
    assert made.world == 8
    assert group.directives() == ["#SBATCH --nodes=3", "#SBATCH --ntasks=8", "#SBATCH --cpus-per-task=1"]
    assert submit.spread(made, [group]) == "3 nodes; Slurm divides 8 ranks, no multiple of the nodes"
    (group,), made = arranged(TopologySection(shards=3), nodes=3, ranks_per_node=4, threads=2, memory="8G")
    assert (group.total, group.ranks, group.threads, group.memory) == (12, None, 2, "8G")
    assert made.replicas == 9


def test_shards_have_nodes_of_their_own():
    groups, made = arranged(
        TopologySection(shards=4),
        nodes=3,
        ranks_per_node=4,
        shard_nodes=2,
        shard_memory="200G",
        shard_partition="fat",
        partition="usual",
    )
    found = [(group.nodes, group.per_node, group.memory, group.partition) for group in groups]
    assert found == [(2, 2, "200G", "fat"), (3, 4, "", "usual")]
    assert made.shard_ranks == (0, 1, 2, 3)
    assert made.worker_ranks == tuple(range(4, 16))
    assert submit.spread(made, groups) == "5 nodes; shards on each: 0 to 2"


def test_the_spread_is_what_counting_says():
    for shards, partitions, nodes, per_node in itertools.product((1, 2, 3), (1, 2, 3), (1, 2, 3), (4, 5, 7)):
        try:
            groups, made = arranged(
                TopologySection(shards=shards, partitions=partitions), nodes=nodes, ranks_per_node=per_node
            )
        except UserError:
            continue
        hosts = np.arange(made.world) // per_node * per_node
        order = ranks_by_position(made, hosts)
        on = [
            [position for position in range(made.world) if order[position] // per_node == node] for node in range(nodes)
        ]
        shards_on = [sum(made.shard_of(position) is not None for position in positions) for positions in on]
        split = 0
        for replica in range(made.replicas):
            split += not any(set(made.ranks_of(replica)) <= set(positions) for positions in on)
        line = submit.spread(made, groups)
        assert f"shards on each: {min(shards_on)}" in line
        assert (f" to {max(shards_on)}" in line) == (max(shards_on) > min(shards_on))
        assert (f"{split} of {made.replicas}" in line) == (partitions > 1)


@pytest.mark.parametrize(
    ("section", "asked", "message"),
    [
        ({}, {}, "--ranks-per-node: is missing"),
        ({"shards": 1, "replicas": 7, "partitions": 1}, {"ranks_per_node": 3}, "8 ranks do not fit 2 nodes of 3"),
        ({"shards": 1, "replicas": 2, "partitions": 1}, {"nodes": 4}, "3 ranks do not fit 4 nodes"),
        ({"partitions": 3}, {"ranks_per_node": 4}, "does not fit the world"),
        ({}, {"ranks_per_node": 4, "shard_memory": "8G"}, "--shard-memory: is for nodes"),
        ({"colocate": True}, {"ranks_per_node": 4, "shard_nodes": 1}, "topology.colocate = true puts shards"),
        ({"shards": 1}, {"ranks_per_node": 4, "shard_nodes": 2}, "expected at most one node for each"),
    ],
)
def test_mistakes_in_numbers(section, asked, message):
    with pytest.raises(UserError, match=message):
        arranged(TopologySection(**section), **asked)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("3:30", 210), ("04:00:00", 14400), ("1-12", 129600), ("2-01:30", 178200), ("0-00:00:45", 45)],
)
def test_limits_are_read_as_slurm_does(text: str, seconds: int) -> None:
    assert submit._limit(text) == seconds


# Submitting

LINE = ("submit", "train.toml", "--nodes", "2", "--ranks-per-node", "4", "--time", "60")


def test_a_run_is_submitted(site: Path, capsys) -> None:
    offer(site, "sbatch", "17;cluster")
    offer(site, "squeue", "")
    offer(site, "srun", "MPI plugin types are...\n\tnone\n\tpmi2")
    assert main([*LINE, "--set", "optimizer.epochs=3"]) == 0
    script = site / "runs" / "my run" / "job.sbatch"
    assert (site / "sbatch.calls").read_text().splitlines() == ["--parsable", str(script)]
    out = capsys.readouterr().out
    assert "8 ranks: 1 shard on separate ranks, 7 replicas of 1 partition" in out
    assert "submitted job 17; its log is my-run.log" in out
    text = script.read_text()
    assert "#SBATCH --job-name=my-run\n" in text
    assert "srun --mpi=pmi2 " in text
    assert "--set optimizer.epochs=3\n" in text


def test_a_dry_run_changes_nothing(site: Path, capsys) -> None:
    """And needs no Slurm: mpirun starts the ranks then."""
    assert main([*LINE, "--dry-run", "--account", "a1", "--memory", "8G"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("#!/bin/bash\n")
    assert "#SBATCH --account=a1\n" in out
    assert "#SBATCH --mem=8G\n" in out
    assert ' launch -n "$SLURM_NTASKS" ' in out
    assert sorted(path.name for path in site.iterdir()) == ["bin", "train.h5", "train.toml"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--time", "1"], "--time 1: is 60 s, and the run would end 120 s before"),
        (["--time", "soon"], "--time 'soon': cannot be written into a batch script; expected minutes"),
        (["--partition", "a b"], "--partition 'a b': cannot be written"),
        (["--mpi", "x;y"], "--mpi 'x;y': expected a name"),
        (["--requeues", "-1"], "--requeues -1: expected at least 0"),
        (["--setup", "none.sh"], "--setup none.sh: no such file"),
        (["--shard-nodes", "1"], "--shard-nodes: mpirun starts ranks in the first component"),
        (["--set", "data.train=none.h5"], "none.h5: does not exist; the job would fail"),
        (["--set", "optimizer.epochs=-1"], "optimizer.epochs"),
        ([], "sbatch: there is no such command"),
    ],
)
def test_mistakes_are_told_before_the_job_waits(site: Path, capsys, words: list[str], message: str) -> None:
    assert main([*LINE, *words]) == 2
    assert message in capsys.readouterr().err
    assert not (site / "sbatch.calls").exists()


def test_a_refusal_of_sbatch_is_passed_on(site: Path, capsys) -> None:
    (site / "bin" / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: no such partition' >&2\nexit 1\n")
    (site / "bin" / "sbatch").chmod(0o755)
    assert main([*LINE]) == 2
    assert "job.sbatch: sbatch: error: no such partition" in capsys.readouterr().err


def test_a_run_is_not_submitted_twice(site: Path, capsys) -> None:
    script = site / "runs" / "my run" / "job.sbatch"
    offer(site, "sbatch", "18")
    offer(site, "squeue", f"17|PENDING|0:00|1:00:00|Resources||{script}")
    assert main([*LINE]) == 2
    assert "job 17 of this run is PENDING" in capsys.readouterr().err
    assert not script.exists()
    offer(site, "squeue", f"17|COMPLETED|0:30|1:00:00|None|n1|{script}")
    assert main([*LINE]) == 0


# Status


def recorded(directory: Path, job: str = "", **fields) -> Path:
    make_run(directory, sessions=2)
    start = {
        "kind": "start", "role": "shard", "number": 0, "session": 2, "time": 1e9, "elapsed": 0.0, "version": "0.1",
        "method": "downpour", "ranks": 3, "shards": 1, "replicas": 2, "partitions": 1, "parameters": 1234,
        "samples": 6000, "samples_before": 9000, "epochs": 3.5, "configuration": "", "job": job,
    }  # fmt: skip
    saved = {
        "kind": "checkpoint", "role": "shard", "number": 0, "session": 2, "time": 1e9, "elapsed": 2.0,
        "name": "step-000000200.h5", "bytes": 1, "seconds": 0.1, "rested": 0.0, "waited": 0.0,
    }  # fmt: skip
    with (directory / "records" / "shard-0.jsonl").open("a") as file:
        file.writelines(json.dumps(line | fields) + "\n" for line in (start, saved))
    return directory


def facts(capsys, *words: str) -> list[dict]:
    assert main(["status", "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_without_slurm_is_shown(site: Path, capsys) -> None:
    recorded(site / "run")
    assert main(["status", "run"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "squeue: there is no such command here; what the runs have recorded:"
    shown = dict(line.split(maxsplit=1) for line in out[1:])
    assert shown["run"] == "run  complete"
    assert shown["epochs"] == "3.5/3.5"
    assert shown["checkpoint"].startswith("step-000000200.h5, ")
    assert shown["starts"] == "2 (resumed)"


def test_a_job_is_found_by_its_script_and_by_what_the_run_has_recorded(site: Path, capsys) -> None:
    recorded(site / "by script")
    recorded(site / "by number", "17_2")
    recorded(site / "by both", "12")
    lines = [
        f"21|RUNNING|1:23|1:00:00|None|n[1-2]|{site}/by script/job.sbatch",
        f"13|FAILED|1:23|1:00:00|None|n1|{site}/by script/job.sbatch",
        f"17_2|COMPLETED|0:30|1:00:00|None|n1|{site}/array.sbatch",
        f"12|COMPLETED|0:30|1:00:00|None|n1|{site}/other.sbatch",
        f"30+1|PENDING|0:30|1:00:00|None||{site}/by both/job.sbatch",
        f"30+0|PENDING|0:30|1:00:00|Priority||{site}/by both/job.sbatch",
    ]
    offer(site, "squeue", "\n".join(lines))
    found = facts(capsys, "by script", "by number", "by both")
    assert [one["job"]["number"] for one in found] == ["21", "17_2", "30+0"]
    assert [one["state"] for one in found] == ["starting", "complete", "waiting"]
    assert [one["run"] for one in facts(capsys, "21")] == ["by script"]
    assert [one["run"] for one in facts(capsys)] == ["by script", "by both"]
    assert main(["status", "by both"]) == 0
    assert "30+0  PENDING: Priority" in capsys.readouterr().out


def test_jobs_that_slurm_has_forgotten_are_in_its_accounts(site: Path, capsys) -> None:
    recorded(site / "run", "17")
    offer(site, "squeue", "")
    offer(site, "sacct", "17|TIMEOUT|01:00:00|01:00:00|None|n1")
    (one,) = facts(capsys, "run")
    assert one["job"] == {"number": "17", "state": "TIMEOUT", "elapsed": "01:00:00"}
    assert main(["status", "17"]) == 0
    assert "17  TIMEOUT on n1, 01:00:00" in capsys.readouterr().out
    offer(site, "sacct", "17|CANCELLED by 0|01:00:00|01:00:00|None|n1")
    assert facts(capsys, "run")[0]["job"]["state"] == "CANCELLED"


def test_the_lock_of_a_killed_job_does_not_count(site: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another host it cannot be told at once from that of a run at work."""
    monkeypatch.setattr("dbmpi.checkpoint.run_presence.RunPresence.look", lambda self: True)
    recorded(site / "run", "17")
    offer(site, "squeue", "17|NODE_FAIL|0:30|1:00:00|None|n1|x")
    assert facts(capsys, "run")[0]["state"] == "complete"
    offer(site, "squeue", "17|RUNNING|0:30|1:00:00|None|n1|x")
    assert facts(capsys, "run")[0]["state"] == "running"


def test_several_runs_are_a_table(site: Path, capsys) -> None:
    offer(site, "squeue", "")
    for name in ("a", "b"):
        recorded(site / name)
    (site / "c" / "records").mkdir(parents=True)
    assert main(["status", "a", "b"]) == 0
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split()[:3] == ["run", "state", "job"]
    assert [row.split()[0] for row in rows] == ["a", "b"]
    assert all("90.00 %" in row and "step-000000200" in row for row in rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["99"], "job 99: squeue: there is no such command here; give the directory of its run"),
        (["none"], "none: is missing; expected the directory of a run"),
        (["train.toml"], "train.toml: is a configuration"),
        ([], "status: squeue: there is no such command here; expected"),
    ],
)
def test_what_is_not_there_is_said(site: Path, capsys, words: list[str], message: str) -> None:
    assert main(["status", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_control_characters_of_a_message_are_left_out(site: Path) -> None:
    (site / "bin" / "squeue").write_text("#!/bin/sh\nprintf 'bad\\033[2J\\n' >&2\nexit 1\n")
    (site / "bin" / "squeue").chmod(0o755)
    assert slurm.queue() == ([], "squeue: bad?[2J")


def test_every_command_of_slurm_is_called_without_a_shell(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(site, "sbatch", "17")
    name = site / "$(touch canary);a b.sbatch"
    assert slurm.submit(name) == "17"
    assert (site / "sbatch.calls").read_text().splitlines() == ["--parsable", str(name)]
    assert "canary" not in os.listdir(site)
