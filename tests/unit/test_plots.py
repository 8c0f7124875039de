"""Plots: the panels show the numbers of the records, and the pictures are written whole or not at all."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.run_records import BATCH, SAMPLES, make_run

from dbmpi.cli import plot
from dbmpi.errors import UserError
from dbmpi.monitor import panels
from dbmpi.monitor.history import RunHistory
from dbmpi.monitor.plots import draw, headline
from dbmpi.monitor.records import read_records

pytest.importorskip("matplotlib", reason="drawing needs the extra [plot]")

PICTURES = ["run.png", "loss.png", "accuracy.png", "throughput.png", "staleness.png", "time.png", "timeline.png"]


@pytest.fixture
def axes():
    from matplotlib.figure import Figure

    return Figure().subplots()


def line(axes, label):
    (found,) = [line for line in axes.lines if line.get_label() == label]
    return np.asarray(found.get_xdata(), float), np.asarray(found.get_ydata(), float)


@pytest.mark.slow
def test_every_picture_is_written_and_is_a_picture(tmp_path):
    """And drawing leaves Matplotlib as it was."""
    import matplotlib as mpl
    from matplotlib.image import imread

    mpl.rcParams["axes.grid"] = before = not mpl.rcParamsDefault["axes.grid"]
    pyplot = "matplotlib.pyplot" in sys.modules
    written = draw(make_run(tmp_path / "run"))
    assert mpl.rcParams["axes.grid"] == before
    assert ("matplotlib.pyplot" in sys.modules) == pyplot
    mpl.rcdefaults()
    assert [path.name for path in written] == PICTURES
    assert sorted(path.name for path in (tmp_path / "run" / "plots").iterdir()) == sorted(PICTURES)
    for path in written:
        image = imread(path)
        assert min(image.shape[:2]) >= 250
        assert image[..., :3].std() > 0.03, f"{path} is blank"


def test_loss_over_steps_leaves_out_what_was_taken_again(tmp_path, axes):
    history = RunHistory(read_records(make_run(tmp_path / "run")))
    assert history.steps_per_epoch == SAMPLES // BATCH
    panels.loss(axes, history, "steps")
    x, y = line(axes, "each report")
    # Session 1 takes 200 steps; session 2 goes on at step 150.  A report's mean stands in the middle of its time.
    epochs = np.repeat([0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5], 2)
    np.testing.assert_allclose(x, 100 * (epochs - 0.25))
    np.testing.assert_allclose(y, 2.0 / epochs)
    x, y = line(axes, "test")
    np.testing.assert_allclose(x, [110, 260, 350])  # evaluated 0.2 seconds after a report
    np.testing.assert_allclose(y, 2.5 / np.array([1.0, 2.5, 3.5]))
    assert line(axes, "resumed")[0] == pytest.approx([150, 150])
    assert "100 an epoch" in axes.get_xlabel()
    assert axes.get_yscale() == "linear"


def test_loss_over_seconds_shows_all_that_was_done(tmp_path, axes):
    history = RunHistory(read_records(make_run(tmp_path / "run")))
    panels.accuracy(axes, history, "seconds")
    x, y = line(axes, "each report")
    end = 4 + 1.5 + 0.2  # of session 1: its last evaluation
    np.testing.assert_allclose(x, np.repeat([2, 3, 4, 5, 2 + end, 3 + end, 4 + end, 5 + end], 2))
    assert y[0] == pytest.approx(100 * (1 - 0.5 / 1.5))
    assert line(axes, "resumed")[0] == pytest.approx([end, end])


def test_a_loss_of_many_decades_is_drawn_on_a_logarithmic_scale(tmp_path, axes):
    directory = make_run(tmp_path / "run", sessions=1)
    path = directory / "records" / "worker-0.jsonl"
    path.write_text(path.read_text().replace('"loss": 1.25', '"loss": 0.0001'))
    panels.loss(axes, RunHistory(read_records(directory)), "seconds")
    assert axes.get_yscale() == "log"


def test_throughput_adds_the_replicas_up(tmp_path, axes):
    history = RunHistory(read_records(make_run(tmp_path / "run", workers=3)))
    panels.throughput(axes, history)
    x, total = line(axes, "all replicas")
    np.testing.assert_allclose(total, sum(line(axes, f"replica {number}")[1] for number in range(3)))
    end = history.starts[2]
    training = ((x > 1.5) & (x <= 5.5)) | ((x > 1.5 + end) & (x <= 5.5 + end))
    np.testing.assert_allclose(total[training], 50 * BATCH)
    np.testing.assert_array_equal(total[~training], 0)


def lose_replicas(directory: Path) -> None:
    """Append passes of 9 portions: replica 2 dies in the first session and replica 1 in the second."""
    lost = {1: [[], [2], [2]], 2: [[], [], [1]]}
    with (directory / "records" / "shard-0.jsonl").open("a") as file:
        for session, passes in lost.items():
            for iteration, dead in enumerate(passes):
                record = {"kind": "batch", "role": "shard", "number": 0, "session": session, "elapsed": 2.0 + iteration}
                record |= {
                    "time": 1e9 + 1000 * session + record["elapsed"],
                    "iteration": iteration,
                    "epoch": 0.5 * iteration,
                }
                record |= {"loss": 1.0, "accuracy": None, "samples": SAMPLES, "portions": {"0": 9}, "revoked": 0}
                file.write(json.dumps(record | {"seconds": 1.0, "lost": dead}) + "\n")


def test_lost_replicas_are_shown_where_they_were_lost(tmp_path, axes):
    directory = make_run(tmp_path / "run", workers=3)
    lose_replicas(directory)
    history = RunHistory(read_records(directory))
    assert [str(lost) for lost in history.lost] == [
        "replica 2 since iteration 1 of session 1",
        "replica 1 since iteration 2 of session 2",
    ]
    panels.throughput(axes, history)
    (first,) = [line for line in axes.lines if line.get_label() == "lost: 1, 2"]
    second = axes.lines[axes.lines.index(first) + 1]
    assert [drawn.get_xdata()[0] for drawn in (first, second)] == [3.0, history.starts[2] + 4.0]
    assert [drawn.get_color() for drawn in (first, second)] == [panels._REPLICAS[2], panels._REPLICAS[1]]
    assert "2 replicas lost" in headline("run", history)


def test_staleness_bars_are_the_shares_of_the_pushes(tmp_path, axes):
    history = RunHistory(read_records(make_run(tmp_path / "run", shards=2)))
    panels.staleness(axes, history)
    heights = [bar.get_height() for bar in axes.patches]
    np.testing.assert_allclose(heights, [0, 90, 0, 10])
    assert line(axes, "mean 1.20")[0] == pytest.approx([1.2, 1.2])
    assert f"{2 * 2 * 4 * 50:,} pushes" in axes.get_legend().get_title().get_text()


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.integers(0, 100_000), st.integers(1, 1000), min_size=1, max_size=20))
def test_any_staleness_fits_into_few_bars(counts):
    from matplotlib.figure import Figure

    record = {"kind": "shard", "number": 0, "session": 1, "elapsed": 1.0}
    history = RunHistory([record | {"staleness_histogram": {str(value): count for value, count in counts.items()}}])
    axes = Figure().subplots()
    panels.staleness(axes, history)
    bars = [(bar.get_x(), bar.get_x() + bar.get_width(), bar.get_height()) for bar in axes.patches]
    assert len(bars) <= 60
    assert sum(height for _, _, height in bars) == pytest.approx(100)
    assert axes.get_xlim()[1] >= max(counts)


def test_where_the_time_goes_is_in_per_cent_of_each_rank(tmp_path, axes):
    history = RunHistory(read_records(make_run(tmp_path / "run", workers=2)))
    panels.time_spent(axes, history, "worker")
    bars = {container.get_label(): [bar.get_width() for bar in container] for container in axes.containers}
    assert list(bars) == ["compute", "data", "fetch", "push", "wait"]
    for activity, share in {"compute": 60, "data": 0, "fetch": 10, "push": 20, "wait": 10}.items():
        np.testing.assert_allclose(bars[activity], [share, share])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["worker 0", "worker 1"]


@pytest.mark.parametrize("ranks", [1, 12, 13, 100])
def test_many_ranks_share_bars_and_none_is_lost(ranks):
    seconds = {number: {"compute": 1.0, "wait": float(number)} for number in range(ranks)}
    labels, bars = panels.grouped("worker", seconds)
    assert len(labels) == len(bars) <= panels.MOST_BARS
    assert sum(bar["compute"] for bar in bars) == ranks
    assert sum(bar["wait"] for bar in bars) == ranks * (ranks - 1) / 2
    assert labels[-1].endswith(str(ranks - 1))


@given(st.lists(st.tuples(st.floats(-10, 10) | st.just(1e20), st.integers(1, 100)), min_size=1, max_size=200))
def test_the_running_mean_agrees_with_its_definition(points):
    y, weights = np.array(points, dtype=np.float64).T
    (smooth,) = panels.running_means(weights, y)
    reach = max(1, len(points) // 40)
    for place in range(len(points)):
        near = min(reach, place, len(points) - 1 - place)
        window = slice(place - near, place + near + 1)
        assert smooth[place] == pytest.approx(np.average(y[window], weights=weights[window]), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"workers": 0},
        {"shards": 0, "classes": False, "workers": 1, "sessions": 1},
        {"sessions": 4, "workers": 20, "shards": 30},
    ],
    ids=str,
)
@pytest.mark.slow
def test_runs_of_all_kinds_can_be_drawn(tmp_path, options, recwarn):
    assert len(draw(make_run(tmp_path / "run", **options))) == len(PICTURES)
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.slow
def test_a_run_that_has_hardly_begun_or_gone_wrong_can_be_drawn(tmp_path, recwarn):
    directory = make_run(tmp_path / "run", workers=1, sessions=1)
    path = directory / "records" / "worker-0.jsonl"
    records = [json.loads(text) for text in path.read_text().splitlines()]
    path.write_text(json.dumps(records[0]) + "\n")
    draw(directory)
    nothing = {"loss": None, "epoch": None, "samples_per_second": None, "accuracy": None, "seconds": {"push": None}}
    extreme = {"loss": 1e300, "epoch": 1e12, "samples_per_second": 1e-12, "samples": 2**62, "accuracy": 1e9, "step": 0}
    for changes in (nothing, extreme):
        path.write_text(
            "".join(json.dumps(record | changes) + "\n" for record in records if record["kind"] == "worker")
        )
        assert len(draw(directory)) == len(PICTURES)
    assert [str(warning.message) for warning in recwarn] == []


def test_without_matplotlib_the_user_is_told_what_to_install(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'dbmpi\[plot\]'"):
        draw(make_run(tmp_path / "run"))
    assert not (tmp_path / "run" / "plots").exists()


def test_where_pictures_cannot_be_put_is_named(tmp_path):
    directory = make_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: cannot make this directory"):
        draw(directory, tmp_path / "file")
    (directory / "plots" / "run.png").mkdir(parents=True)
    with pytest.raises(UserError, match=r"run\.png: cannot write the picture"):
        draw(directory)
    assert [path.name for path in (directory / "plots").iterdir()] == ["run.png"]


def command(*words):
    parser = argparse.ArgumentParser()
    plot.add_arguments(parser)
    return plot.run(parser.parse_args([str(word) for word in words]))


@pytest.mark.slow
def test_the_command_prints_what_it_wrote_and_what_it_skipped(tmp_path, capsys):
    directory = make_run(tmp_path / "run")
    with (directory / "records" / "worker-0.jsonl").open("a") as file:
        file.write('{"kind": "worker", "st')
    assert command(directory, "--out", tmp_path / "elsewhere" / "deep") == 0
    output = capsys.readouterr()
    assert output.out.splitlines() == [str(tmp_path / "elsewhere" / "deep" / name) for name in PICTURES]
    assert sorted(path.name for path in (tmp_path / "elsewhere" / "deep").iterdir()) == sorted(PICTURES)
    assert not (directory / "plots").exists()
    assert "skipped 1 line" in output.err


def test_the_command_refuses_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match="nowhere: is missing; expected the directory of a run"):
        command(tmp_path / "nowhere")
