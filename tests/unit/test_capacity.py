"""How much memory there is, and that commands refuse what it does not hold."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from unit.test_evaluate import SAMPLES, make_data, refused, run, train

from dbmpi.cli.main import main
from dbmpi.data import limits
from dbmpi.data.source import Source
from dbmpi.machine import capacity

CONFIG = """
[data]
train = "none.h5"
[[network.layers]]
units = 3
"""


def test_the_least_of_what_limits_a_process_is_available(tmp_path, monkeypatch):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       999 kB\nMemAvailable:   500 kB\n")
    assert capacity.available(meminfo, tmp_path) == 500 * 1024
    assert capacity.available(tmp_path / "none", tmp_path) > 500 * 1024
    assert 0 < capacity.available() < 2**50
    # A control group, and one above it.
    (tmp_path / "cgroup").write_text("0::/job/step\n")
    below = tmp_path / "job" / "step"
    below.mkdir(parents=True)
    (below / "memory.max").write_text("max\n")
    (below / "memory.current").write_text("10\n")
    (tmp_path / "job" / "memory.max").write_text("1000\n")
    (tmp_path / "job" / "memory.current").write_text("900\n")
    (tmp_path / "job" / "memory.stat").write_text("anon 600\ninactive_file 200\nactive_file 50\n")
    found = list(capacity.of_group(tmp_path, tmp_path / "cgroup"))
    assert found == [1000 - 900 + 250]
    (tmp_path / "cgroup").write_text("5:cpu,memory:/old\n3:freezer:/old\n")
    (tmp_path / "memory" / "old").mkdir(parents=True)
    (tmp_path / "memory" / "old" / "memory.limit_in_bytes").write_text("700\n")
    (tmp_path / "memory" / "old" / "memory.usage_in_bytes").write_text("300\n")
    assert list(capacity.of_group(tmp_path, tmp_path / "cgroup")) == [400]


def test_limits_of_the_process_count():
    code = (
        "import resource; from dbmpi.machine import capacity\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({2**33}, resource.RLIM_INFINITY))\n"
        "print(capacity.available())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(found.stdout) < 2**33
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def test_a_batch_of_an_evaluation_is_no_larger_than_the_data(tmp_path, capsys):
    train(tmp_path / "run")
    make_data(tmp_path / "data.h5")
    words = ("--data", tmp_path / "data.h5", "--batch-size")
    found = [json.loads(run(capsys, "evaluate", tmp_path / "run", *words, size, "--json")) for size in (SAMPLES, 2**62)]
    assert found[0] == found[1]
    run(capsys, "predict", tmp_path / "run", *words, 10**12, "--out", tmp_path / "out.h5")


def test_a_batch_of_an_evaluation_that_does_not_fit_is_refused(tmp_path, capsys, monkeypatch):
    train(tmp_path / "run")
    make_data(tmp_path / "data.h5")
    each = 4 * (12 + 9 + 7 + 5)
    monkeypatch.setattr(capacity, "available", lambda: 20 * each)
    words = ("--data", tmp_path / "data.h5")
    message = refused(capsys, "evaluate", tmp_path / "run", *words)
    assert f"batch_size = {SAMPLES}: the activations" in message
    assert "set it to 20 or less" in message
    run(capsys, "evaluate", tmp_path / "run", *words, "--batch-size", 20)
    refused(capsys, "predict", tmp_path / "run", *words, "--out", tmp_path / "out.h5")
    assert not (tmp_path / "out.h5").exists()


@pytest.mark.parametrize("words", [("--batch", 10**12), ("--set", "optimizer.batch_size=1000000000000")])
def test_a_benchmark_that_does_not_fit_is_refused(tmp_path, capsys, words):
    (tmp_path / "run.toml").write_text(CONFIG)
    message = refused(capsys, "bench", "network", tmp_path / "run.toml", "--input-shape", "5", *words)
    assert "= 1,000,000,000,000: the activations of a batch take" in message


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("libsvm", "FILE", "--features", 10**12), "would take"),
        (("csv", "FILE", "--classes", 10**12), "classes were given"),
        (("wav", "FILE", "--context", 10**12 + 1), "context"),
        (("wav", "FILE", "--states", 10**12), "states"),
        (("wav", "FILE", "--rate", 10**12), "rate"),
    ],
)
def test_importers_refuse_numbers_that_would_take_the_memory(tmp_path, capsys, words, text):
    (tmp_path / "file").write_text("1 1:2\n" if words[0] == "libsvm" else "1,2\n")
    words = [tmp_path / "file" if word == "FILE" else word for word in words]
    assert text in refused(capsys, "data", "import", *words, "--out", tmp_path / "out.h5")


def test_what_does_not_fit_the_memory_ends_with_a_sentence(tmp_path, capsys, monkeypatch):
    make_data(tmp_path / "data.h5")
    train(tmp_path / "run")

    def fail(*arguments):
        np.empty(2**55)  # more than any address space

    monkeypatch.setattr(Source, "batch", fail)
    assert main(["evaluate", str(tmp_path / "run"), "--data", str(tmp_path / "data.h5")]) == 1
    message = capsys.readouterr().err
    assert "out of memory: Unable to allocate 256. PiB" in message
    assert "are available here.  Lower optimizer.batch_size" in message
    assert "Traceback" not in message


def test_numbers_are_lowered_to_what_the_data_can_fill():
    from dbmpi.config import Run

    given = Run.model_validate(
        {
            "data": {"train": Path("x.h5")},
            "network": {"layers": [{"units": 3}]},
            "optimizer": {"method": "sandblaster", "batch_size": 7},
            "sandblaster": {"batch_portions": 100, "portions_per_push": 50},
        }
    )
    found, notices = limits.fitted(given, 40)
    assert (found.sandblaster.batch_portions, found.sandblaster.portions_per_push) == (6, 6)
    assert len(notices) == 2
    assert limits.fitted(found, 40) == (found, ())
    assert found.optimizer == given.optimizer
    small, _ = limits.fitted(given, 5)
    assert (small.optimizer.batch_size, small.sandblaster.batch_portions) == (5, 1)
    downpour = given.model_copy(update={"optimizer": given.optimizer.model_copy(update={"method": "downpour"})})
    assert limits.fitted(downpour, 40) == (downpour, ())
