"""Imports in several data files, interrupted and given again, beside one in a single file."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io.wavfile
from hypothesis import given, settings
from hypothesis import strategies as st

from dbmpi.data.importers.parts import parts
from dbmpi.data.importers.wav import import_wav
from dbmpi.data.source import Source
from dbmpi.errors import UserError

RATE = 8000


@pytest.fixture
def folder(tmp_path):
    """Nine recordings of three digits by two speakers."""
    place = tmp_path / "recordings"
    place.mkdir()
    for number in range(9):
        random = np.random.default_rng(number)
        name = f"{number % 3}_{'ann' if number % 2 else 'bob'}_{number}.wav"
        signal_ = random.normal(scale=0.1 + 0.02 * number, size=1500 + 100 * number).astype(np.float32)
        scipy.io.wavfile.write(place / name, RATE, signal_)
    return place


def content(place: Path) -> tuple[np.ndarray, np.ndarray]:
    with Source.open(place, 64) as source:
        every = np.arange(source.samples)
        return np.moveaxis(source.inputs(every), -1, 0), source.targets(every)


def assert_same(tmp_path: Path) -> None:
    whole, joined = content(tmp_path / "whole.h5"), content(tmp_path / "part-*.h5")
    np.testing.assert_array_equal(joined[0], whole[0])
    np.testing.assert_array_equal(joined[1], whole[1])


def importing(folder: Path, slowly: str = "") -> list[str]:
    """Return the command that imports in parts of two recordings; `slowly` is a line to run before."""
    words = ["data", "import", "wav", str(folder), "--out", str(folder.parent / "part-{}.h5"), "--per-file", "2"]
    return [sys.executable, "-c", f"import sys\n{slowly}\nfrom dbmpi.cli.main import main\nsys.exit(main({words!r}))"]


SLOWLY = """
import time
from dbmpi.data.importers import wav
decoded = wav.decoded
wav.decoded = lambda *arguments: (time.sleep(0.2), decoded(*arguments))[1]
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_import_that_is_stopped_goes_on_behind_what_is_complete(tmp_path, folder, number):
    import_wav(folder, tmp_path / "whole.h5")
    program = subprocess.Popen(importing(folder, SLOWLY), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    until = time.monotonic() + 120
    while not (tmp_path / "part-1.h5").exists() and program.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    program.send_signal(number)
    program.communicate(timeout=60)
    there = {path: path.stat().st_mtime_ns for path in tmp_path.glob("part-?.h5")}
    assert 2 <= len(there) < 5
    done = subprocess.run(importing(folder), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(path.stat().st_mtime_ns == before for path, before in there.items())
    assert done.stdout.count("part-") == 5 - len(there)
    assert_same(tmp_path)
    with h5py.File(tmp_path / "whole.h5") as whole, h5py.File(tmp_path / "part-4.h5") as last:
        assert {*last.attrs} == {*whole.attrs, "plan"}
        np.testing.assert_array_equal(last.attrs["mean"], whole.attrs["mean"])
        assert last["targets"].attrs["classes"] == whole["targets"].attrs["classes"]


def test_what_is_complete_is_of_the_same_recordings_read_in_the_same_way(tmp_path, folder):
    out = tmp_path / "part-{}.h5"
    assert len(import_wav(folder, out, per_file=4)) == 3
    assert import_wav(folder, out, per_file=4) == []
    for other in ({"context": 5}, {"states": 2}, {"classes": 40}, {"rate": 16000}):
        with pytest.raises(UserError, match=r"part-0\.h5: exists already"):
            import_wav(folder, out, per_file=4, **other)
    scipy.io.wavfile.write(folder / "0_bob_6.wav", RATE, np.zeros(4000, np.float32))  # of a later part
    with pytest.raises(UserError, match=r"part-0\.h5: exists already"):
        import_wav(folder, out, per_file=4)
    assert len(import_wav(folder, out, per_file=4, force=True)) == 3


def test_a_part_without_labelled_frames_is_left_out(tmp_path, folder):
    paths = sorted(path.name for path in folder.iterdir())
    named = [paths[0], paths[-1]]
    (tmp_path / "table.csv").write_text("file,label,speaker\n" + "".join(f"{name},a,\n" for name in named))
    import_wav(folder, tmp_path / "whole.h5", table=tmp_path / "table.csv")
    written = import_wav(folder, tmp_path / "part-{}.h5", table=tmp_path / "table.csv", per_file=3)
    assert [each.path.name for each in written] == ["part-0.h5", "part-2.h5"]
    assert_same(tmp_path)


def test_parts_that_cannot_be(tmp_path, folder):
    with pytest.raises(UserError, match=r"expected a name with \{\}"):
        import_wav(folder, tmp_path / "out.h5", per_file=2)
    for other in ({"test_out": tmp_path / "t.h5", "test_speakers": ["bob"]}, {}):
        source = folder if other else next(folder.iterdir())
        with pytest.raises(UserError, match="--per-file 2: is for a directory, without --test-out"):
            import_wav(source, tmp_path / "out-{}.h5", per_file=2, **other)
    assert not [*tmp_path.glob("*.h5")]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(1, 12))
def test_every_source_is_in_one_part(tmp_path_factory, count, per_file):
    folder = tmp_path_factory.mktemp("sources")
    sources = [folder / str(number) for number in range(count)]
    for source in sources:
        source.touch()
    found = list(parts(folder / "{}.h5", sources, per_file, "way"))
    assert [source for part in found for source in part.sources] == sources
    assert all(len(part.sources) == per_file for part in found[:-1])
    assert len({part.plan for part in found}) == len({part.out for part in found}) == len(found)
    assert not any(part.is_there for part in found)
