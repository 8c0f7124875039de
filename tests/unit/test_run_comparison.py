"""Runs beside one another: curves over samples, names that tell them apart, and a table of results."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.run_records import BATCH, make_run

from dbmpi.cli.main import main
from dbmpi.errors import UserError
from dbmpi.monitor import panels, run_comparison
from dbmpi.monitor.history import RunHistory
from dbmpi.monitor.pictures import plain
from dbmpi.monitor.records import read_records
from dbmpi.monitor.run_comparison import NamedRun


def history(directory: Path) -> RunHistory:
    return RunHistory(read_records(directory))


def test_samples_of_a_resumed_run_go_on_where_its_steps_do(tmp_path):
    """Without a record of the start they follow from the steps; with it they are what it says."""
    directory = make_run(tmp_path / "run")
    run = history(directory)
    for elapsed in (1.5, 2.5, 3.1, 5.5, 5.7):
        assert run.samples(1, elapsed) == pytest.approx(BATCH * run.steps(1, elapsed))
        assert run.samples(2, elapsed) == pytest.approx(BATCH * run.steps(2, elapsed))
    x, y, _ = panels.training_points(run, "loss", "samples")
    by_steps, same, _ = panels.training_points(run, "loss", "steps")
    np.testing.assert_allclose(x, BATCH * by_steps)
    np.testing.assert_array_equal(y, same)
    start = {
        "kind": "start", "role": "shard", "number": 0, "session": 2, "time": 1e9, "elapsed": 0.0, "version": "1",
        "method": "downpour", "ranks": 3, "shards": 1, "replicas": 2, "partitions": 1, "parameters": 10,
        "samples": 6000, "samples_before": 1000, "epochs": 4.0, "configuration": "",
    }  # fmt: skip
    with (directory / "records" / "shard-0.jsonl").open("a") as file:
        file.write(json.dumps(start) + "\n")
    assert history(directory).samples(2, 0.0) == 1000


@given(st.lists(st.lists(st.sampled_from("ab"), min_size=1, max_size=4), min_size=1, max_size=5, unique_by=tuple))
def test_names_differ_and_are_ends_of_the_paths(parts):
    paths = [Path("/", *part) for part in parts]
    found = run_comparison.names(paths)
    assert len(set(found)) == len(paths)
    for name, path in zip(found, paths, strict=True):
        assert str(path).endswith(name)


def test_the_shortest_names_are_taken():
    paths = [Path("/x/one/run"), Path("/x/two/run"), Path("/x/three")]
    assert run_comparison.names(paths) == ["one/run", "two/run", "three"]
    with pytest.raises(UserError, match="is given twice"):
        run_comparison.names([Path("/x/one"), Path("/x/two/../one")])


def test_what_a_picture_would_misunderstand_is_written_as_it_is():
    from matplotlib.figure import Figure

    pytest.importorskip("matplotlib", reason="drawing needs the extra [plot]")
    name = "$\\frac{1$ \x1b[31m_" + "x" * 200 + "end"
    shown = plain(name)
    assert "\x1b" not in shown
    assert shown.endswith("end")
    figure = Figure()
    figure.suptitle(shown)
    figure.canvas.draw()  # a formula that is none would raise


@pytest.mark.slow
def test_the_command_compares_runs(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="drawing needs the extra [plot]")
    from matplotlib.image import imread

    runs = [make_run(tmp_path / name, workers=workers) for name, workers in (("_one$a$", 2), ("two", 3))]
    runs.append(make_run(tmp_path / "values", classes=False, workers=0, shards=0))
    assert main(["plot", *map(str, runs), "--out", str(tmp_path / "out")]) == 0
    head, first, second, third, path = capsys.readouterr().out.splitlines()
    assert head.split()[:6] == ["run", "epochs", "samples", "seconds", "samples/s", "staleness"]
    assert first.split() == ["_one$a$", "3.5", "24,000", "8.0", "3,000", "1.20", "0.5714", "0.7143", "90.00", "%"]
    assert second.split()[0] == "two"
    assert third.split()[0] == "values"
    assert third.split()[-1] == "-"
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["comparison.png"]
    image = imread(path)
    assert image[..., :3].std() > 0.05


def test_runs_that_cannot_be_told_apart_are_too_many(tmp_path):
    run = NamedRun("run", history(make_run(tmp_path / "run", sessions=1)))
    with pytest.raises(UserError, match="25 runs are more than can be told apart"):
        run_comparison.draw([run] * 25, tmp_path)


def test_bad_runs_are_named(tmp_path, capsys):
    good = make_run(tmp_path / "good")
    for bad, words in ((tmp_path / "none", "is missing"), (tmp_path, "holds no records")):
        assert main(["plot", str(good), str(bad), "--out", str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
    with (good / "records" / "worker-1.jsonl").open("a") as file:
        file.write('{"format": 2, "kind": "worker"}\n')
    assert main(["plot", str(good)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "worker-1.jsonl: was written by a newer dbmpi, as records of format 2; this one reads format 1" in line
