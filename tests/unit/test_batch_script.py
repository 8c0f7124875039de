"""Batch scripts: what Slurm and bash read in them, values that cannot become commands, and what a warning leads to."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from harness.environment import timeout_scale

from dbmpi.errors import UserError
from dbmpi.machine.batch_script import BatchJob, NodeGroup, Variants, directive, render

PROJECT = Path(__file__).parents[2]
SCRIPTS = sorted((PROJECT / "jobs" / "slurm").glob("*.sbatch"))
SHAPES = {
    "job-name": r"[\w.-]+",
    "array": r"0-\d+",
    "nodes": r"[1-9]\d*",
    "ntasks-per-node": r"[1-9]\d*",
    "cpus-per-task": r"[1-9]\d*",
    "mem": r"\d+G",
    "time": r"(\d+-)?\d\d:\d\d:\d\d",
    "output": r"%x(-%a)?\.log",
    "open-mode": "append",
    "signal": r"B:USR2@[1-9]\d*",
}
"""Every directive with a value, and the form that it must have."""
NASTY = "a b'c\"$(touch canary)`touch canary`\n#SBATCH --nodes=9\ntouch canary;\\"
JOB = BatchJob("job", (NodeGroup(nodes=2, per_node=3, threads=4),), "60", "train.toml", launcher="srun")
HETEROGENEOUS = replace(JOB, groups=(NodeGroup(1, 2, 8), NodeGroup(4, 8, 2)))
ARRAY = replace(JOB, launcher="mpirun", variants=Variants("optimizer.learning_rate", ("0.1", "0.2", NASTY)))


def by_name(path: Path) -> str:
    return path.stem


def test_the_files_are_what_the_tool_writes():
    specification = importlib.util.spec_from_file_location("scripts", PROJECT / "tools" / "write_batch_scripts.py")
    tool = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tool)
    written = {path.name: path.read_text(encoding="utf-8") for path in SCRIPTS}
    assert written == tool.texts(), "run: python tools/write_batch_scripts.py"


# As texts


@pytest.mark.parametrize("path", SCRIPTS, ids=by_name)
def test_directives_are_those_that_were_meant(path: Path) -> None:
    """And stand where Slurm looks for them: it stops at the first command."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/bin/bash"
    assert all(len(line) <= 120 for line in lines)
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [line for line in lines if line.startswith("#SBATCH")]
    assert max(lines.index(line) for line in directives) < first_command
    alone = [line.removeprefix("#SBATCH ") for line in directives if "=" not in line]
    assert alone == ["--requeue", *(["hetjob"] if path.stem == "heterogeneous" else [])]
    found = [re.fullmatch(r"#SBATCH --([a-z-]+)=(\S+)", line) for line in directives if "=" in line]
    assert all(found)
    for match in found:
        assert re.fullmatch(SHAPES[match[1]], match[2]), match[0]
    assert {"open-mode", "signal", "time", "output"} <= {match[1] for match in found}


@pytest.mark.parametrize("path", SCRIPTS, ids=by_name)
def test_all_that_is_to_be_edited_stands_above_the_line(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    (rule,) = [number for number, line in enumerate(lines) if re.fullmatch(r"# -{50,}", line)]
    assert lines[rule + 1] == "set -euo pipefail"
    above = [line.partition("=")[0] for line in lines[:rule] if re.match(r"[a-z]+=", line)]
    assert above == ["configuration", *(["values"] if path.stem == "array" else []), "requeues"]


def test_an_array_has_a_task_for_each_value():
    text = (PROJECT / "jobs" / "slurm" / "array.sbatch").read_text(encoding="utf-8")
    (last,) = re.findall(r"--array=0-(\d+)", text)
    (values,) = re.findall(r"^values=\((.*?)\)", text, re.MULTILINE)
    assert int(last) + 1 == len(values.split())


@pytest.mark.parametrize("path", SCRIPTS, ids=by_name)
def test_shellcheck_has_nothing_to_say(path: Path) -> None:
    found = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    if found is None:
        pytest.skip("shellcheck is not installed")
    # 1091: there is no environment to look into.
    done = subprocess.run([found, "--exclude=SC1091", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# Values


@pytest.mark.parametrize("value", ["", "a b", "a\nb", "$(x)", "`x`", "a;b", "a'b", "a#b", "é", "a\\b", "--x y"])
@pytest.mark.parametrize("name", ["job-name", "partition", "account", "qos", "constraint", "mem", "time", "nodes"])
def test_directives_take_plain_values_only(name: str, value: str) -> None:
    with pytest.raises(UserError, match="cannot be written into a batch script; expected"):
        directive(name, value)


def test_values_that_slurm_understands_are_taken():
    for name, value in (
        ("time", "1-12:00"),
        ("time", "90"),
        ("mem", "16G"),
        ("constraint", "a&b|[c*2]"),
        ("qos", "x+"),
    ):
        assert directive(name, value) == f"#SBATCH --{name}={value}"


def test_settings_of_an_array_are_names():
    with pytest.raises(UserError, match="cannot be varied"):
        render(replace(ARRAY, variants=Variants("a.b$(touch canary)", ("1",))), "x")


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A directory whose ``bin`` has commands that write down their arguments; srun and dbmpi run what RUN says."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("srun", "dbmpi", "scontrol"):
        (programs / name).write_text(
            f"#!{sys.executable}\nimport json, os, sys\n"
            "if sys.argv[1:] == ['--mpi=list']: sys.exit(print('MPI plugin types:', 'none', 'pmi2', sep='\\n\\t'))\n"
            f"with open('calls', 'a') as file: file.write(json.dumps([{name!r}, *sys.argv[1:]]) + '\\n')\n"
            f"if {name != 'scontrol'}: os.execvp('bash', ['bash', '-c', os.environ['RUN']])\n"
        )
        (programs / name).chmod(0o755)
    return tmp_path


def start(cluster: Path, text: str, run: str = "exit 0", **variables: str) -> subprocess.Popen[str]:
    (cluster / "job").write_text(text, encoding="utf-8")
    environment = {"PATH": f"{cluster / 'bin'}:/usr/bin:/bin", "SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n[1-2]"}
    environment |= {"SLURM_NTASKS": "6", "SLURM_CPUS_PER_TASK": "4", "RUN": run} | variables
    pipe = subprocess.PIPE
    return subprocess.Popen(["bash", "job"], cwd=cluster, env=environment, text=True, stdout=pipe, stderr=pipe)


def calls(cluster: Path) -> list[list[str]]:
    return [json.loads(line) for line in (cluster / "calls").read_text().splitlines()]


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = process.communicate(timeout=30 * timeout_scale())
    return process.returncode, out + err


def test_no_value_becomes_a_command(cluster: Path) -> None:
    job = replace(JOB, configuration=NASTY, overrides=(f"run.directory={NASTY}", "a.b=$HOME"), program="dbmpi")
    code, output = ended(start(cluster, render(job, "Test.")))
    assert code == 0, output
    (call,) = calls(cluster)
    words = ["train", NASTY, "--set", f"run.directory={NASTY}", "--set", "a.b=$HOME", "--set", "checkpoint.resume=auto"]
    assert call[call.index("dbmpi") + 1 :] == words
    assert not (cluster / "canary").exists()
    # Slurm reads no directives behind the first command.
    assert "SBATCH --nodes=9" not in render(job, "Test.").partition("\nconfiguration=")[0]


def test_each_task_of_an_array_has_its_value(cluster: Path) -> None:
    for task, value in enumerate(ARRAY.variants.values):
        array = {"SLURM_ARRAY_JOB_ID": "16", "SLURM_ARRAY_TASK_ID": str(task)}
        code, output = ended(start(cluster, render(ARRAY, "Test."), **array))
        assert code == 0, output
        words = ["--set", f"optimizer.learning_rate={value}", "--set", f"run.directory=runs/learning_rate-{value}"]
        assert calls(cluster)[-1][-6:-2] == words
    assert not (cluster / "canary").exists()


def test_components_of_a_heterogeneous_job_are_one_world(cluster: Path) -> None:
    threads = {f"SLURM_CPUS_PER_TASK_HET_GROUP_{group}": str(number) for group, number in ((0, 8), (1, 2))}
    code, output = ended(start(cluster, render(HETEROGENEOUS, "Test."), **threads))
    assert code == 0, output
    (call,) = calls(cluster)
    first, second = call[: call.index(":")], call[call.index(":") + 1 :]
    assert {"--het-group=0", "--cpus-per-task=8"} <= set(first)
    assert second[:2] == ["--het-group=1", "--cpus-per-task=2"]
    assert first[first.index("dbmpi") :] == second[second.index("dbmpi") :]


# Warnings


STOPS = "trap 'exit 140' USR2; touch ready; while :; do read -t 0.05 <> <(:) || :; done"
"""A run that ends at a warning, as the ranks do."""


@pytest.mark.parametrize(
    ("number", "restarts", "requeued"),
    [
        (signal.SIGUSR2, None, True),
        (signal.SIGUSR1, "3", True),
        (signal.SIGTERM, None, False),
        (signal.SIGUSR2, "100", False),
    ],
    ids=["USR2", "USR1", "TERM", "often enough"],
)
def test_a_warning_ends_the_run_and_requeues_the_job(cluster: Path, number: int, restarts, requeued: bool) -> None:
    job = replace(JOB, launcher="mpirun")
    process = start(cluster, render(job, "Test."), STOPS, **({"SLURM_RESTART_COUNT": restarts} if restarts else {}))
    while not (cluster / "ready").exists():
        assert process.poll() is None, process.communicate()
    process.send_signal(number)
    code, output = ended(process)
    assert code == 140, output
    assert calls(cluster)[1:] == ([["scontrol", "requeue", "17"]] if requeued else [])


def test_a_warning_before_the_ranks_are_started_counts(cluster: Path) -> None:
    """While the script asks which MPI there is; then it starts none."""
    asked, answer = cluster / "asked", cluster / "answer"
    (cluster / "bin" / "python").write_text(
        f"#!/bin/sh\ntouch {asked}\nwhile [ ! -e {answer} ]; do sleep 0.05; done\necho MPICH\n"
    )
    (cluster / "bin" / "python").chmod(0o755)
    process = start(cluster, render(replace(JOB, launcher="auto"), "Test."), STOPS)
    while not asked.exists():
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGUSR2)
    answer.touch()
    code, output = ended(process)
    assert code == 140, output
    assert "6 ranks by pmi2" in output
    assert calls(cluster) == [["scontrol", "requeue", "17"]]


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (2, False), (138, True)])
def test_other_ends_are_passed_on(cluster: Path, code: int, requeued: bool) -> None:
    """138 comes from ranks that Slurm has signalled itself, by ``--signal=USR1@120``."""
    array = {"SLURM_ARRAY_JOB_ID": "16", "SLURM_ARRAY_TASK_ID": "2"}
    assert ended(start(cluster, render(ARRAY, "Test."), f"exit {code}", **array))[0] == code
    assert calls(cluster)[1:] == ([["scontrol", "requeue", "16_2"]] if requeued else [])
