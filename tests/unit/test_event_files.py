"""Event files for TensorBoard: its own reader finds the numbers of the records."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
from unit.run_records import make_run

from dbmpi.checkpoint.run_lock import locked
from dbmpi.cli.main import main
from dbmpi.monitor.event_files import EventFiles
from dbmpi.monitor.history import RunHistory
from dbmpi.monitor.records import read_records

pytest.importorskip("tensorboardX", reason="writing event files needs the extra [tensorboard]")


def read(directory):
    """Read event files as TensorBoard does."""
    accumulators = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="the judge is TensorBoard"
    )
    found = accumulators.EventAccumulator(str(directory))
    found.Reload()
    return found


def test_tensorboard_reads_the_numbers_of_the_records(tmp_path, capsys):
    run = make_run(tmp_path / "run", sessions=1)
    assert main(["export", str(run), "--tensorboard", str(tmp_path / "logs")]) == 0
    assert f"tensorboard --logdir {tmp_path / 'logs'}" in capsys.readouterr().out
    history, found = RunHistory(read_records(run)), read(tmp_path / "logs" / "run")
    tests = found.Scalars("test/loss")
    assert [one.step for one in tests] == [record["step"] for record in history.evaluations]
    np.testing.assert_allclose([one.value for one in tests], [record["loss"] for record in history.evaluations])
    np.testing.assert_allclose([one.wall_time for one in tests], [record["time"] for record in history.evaluations])
    trained = found.Scalars("train/loss")
    assert len(trained) == 8
    steps = [one.step for one in trained]
    assert steps == sorted(steps)
    assert steps[-1] == 200
    assert found.Scalars("shard/staleness")[0].value == pytest.approx(1.2)
    assert found.Scalars("time_of_workers/compute")[0].value == pytest.approx(0.6)


def test_what_a_resumed_session_repeats_is_left_out(tmp_path):
    run = make_run(tmp_path / "run", sessions=2)
    assert main(["export", str(run), "--tensorboard", str(tmp_path / "logs")]) == 0
    tests = read(tmp_path / "logs" / "run").Scalars("test/loss")
    # Session 1 evaluates after 100 and 200 steps; session 2 begins at step 150.
    assert [one.step for one in tests] == [100, 250, 350]


def test_files_are_replaced_only_if_told(tmp_path, capsys):
    run = make_run(tmp_path / "run", sessions=1)
    words = ["export", str(run), "--tensorboard", str(tmp_path / "logs")]
    for _ in range(2):
        assert main([*words, "--force"]) == 0
        assert len(list((tmp_path / "logs" / "run").iterdir())) == 1
    assert main(words) == 2
    assert "has event files of a run already" in capsys.readouterr().err


def test_a_run_is_followed_to_its_end(tmp_path):
    directory = tmp_path / "run"
    whole = make_run(tmp_path / "whole", workers=1, sessions=1)
    (directory / "records").mkdir(parents=True)
    source = whole / "records" / "worker-0.jsonl"
    rows = source.read_text().splitlines(keepends=True)
    path = directory / "records" / "worker-0.jsonl"
    path.write_text(rows[0])
    words = ["export", str(directory), "--tensorboard", str(tmp_path / "logs"), "--follow"]
    with locked(directory, print):
        follower = subprocess.Popen([sys.executable, "-m", "dbmpi", *words], stdout=subprocess.PIPE, text=True)
        while not list((tmp_path / "logs").glob("run/*")):
            assert follower.poll() is None
            time.sleep(0.05)
        with path.open("a") as file:
            file.writelines(rows[1:])
    assert "values; to see them" in follower.communicate(timeout=60)[0]
    assert follower.returncode == 0
    assert len(read(tmp_path / "logs" / "run").Scalars("train/loss")) == 4


def test_texts_of_strangers_are_shown_as_they_are(tmp_path):
    run = make_run(tmp_path / "run", sessions=1)
    start = {
        "kind": "start", "role": "shard", "number": 0, "session": 1, "time": 1e9, "elapsed": 0.0, "version": "1",
        "method": "downpour", "ranks": 3, "shards": 1, "replicas": 2, "partitions": 1, "parameters": 10,
        "samples": 6000, "samples_before": 0, "epochs": 4.0,
        "configuration": '{"a": "<script>alert(1)</script>\\n# b"}',
    }  # fmt: skip
    with (run / "records" / "shard-0.jsonl").open("a") as file:
        file.write(json.dumps(start) + "\n")
    with EventFiles(tmp_path / "logs") as events:
        events.add(read_records(run))
    tensor = read(tmp_path / "logs").Tensors("configuration/text_summary")[0]
    text = tensor.tensor_proto.string_val[0].decode()
    assert all(line.startswith("    ") for line in text.splitlines())
    assert "<script>" in text


def test_what_cannot_be_exported_is_named(tmp_path, capsys):
    run = make_run(tmp_path / "run", sessions=1)
    (tmp_path / "file").touch()
    for words, part in (
        (["export", str(tmp_path), "--tensorboard", str(tmp_path / "logs")], "holds no records"),
        (["export", str(run), "--tensorboard", str(tmp_path / "file")], "cannot write event files there"),
        (["export", str(run), "--out", "x.npz", "--follow"], "--follow: is for --tensorboard"),
    ):
        assert main(words) == 2
        assert part in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", str(run)])
    assert "--out --tensorboard is required" in capsys.readouterr().err


def test_without_the_library_it_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert main(["export", str(make_run(tmp_path / "run")), "--tensorboard", str(tmp_path / "logs")]) == 2
    assert "pip install 'dbmpi[tensorboard]'" in capsys.readouterr().err
