"""Recordings become frames of log mel energies: compared with slow twins, and strangers' files cannot do harm."""

import argparse
import csv
import gzip
import io
import math
import os
import tarfile
import wave
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io.wavfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dbmpi.cli import data as command
from dbmpi.data.importers import recordings as reading
from dbmpi.data.importers.mel import LogMel, filter_bank
from dbmpi.data.importers.reading import no_progress
from dbmpi.data.importers.recordings import Recording, decoded, recordings
from dbmpi.data.importers.wav import import_wav
from dbmpi.data.source import Source
from dbmpi.errors import UserError

DATA = Path(os.environ.get("DBMPI_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
FSDD = DATA / "fsdd" / "fsdd-recordings.tar"
RATE = 8000


# --- slow twins ---


def naive_filter(rate, transform, filters, number, bin_):
    def mel(hertz):
        return 1127.01048 * math.log(1 + hertz / 700)  # the same scale by the natural logarithm

    step = mel(rate / 2) / (filters + 1)
    low, middle, high = (step * (number + offset) for offset in (0, 1, 2))
    place = mel(bin_ * rate / transform)
    if low < place <= middle:
        return (place - low) / (middle - low)
    if middle < place < high:
        return (high - place) / (high - middle)
    return 0.0


def naive_log_mel(signal, rate, filters=40):
    """Return log mel energies by the definition of every step: sums and loops."""
    window, hop = round(rate * 25 / 1000), round(rate / 100)
    transform = 1
    while transform < window:
        transform *= 2
    times = np.arange(window)
    bins = np.arange(transform // 2 + 1)
    fourier = np.exp(-2j * np.pi * np.outer(bins, times) / transform)
    weights = np.array([[naive_filter(rate, transform, filters, f, b) for b in bins] for f in range(filters)])
    rows = []
    start = 0
    while start + window <= len(signal):
        piece = signal[start : start + window] * (0.54 - 0.46 * np.cos(2 * np.pi * times / (window - 1)))
        rows.append(np.log(np.maximum(weights @ np.abs(fourier @ piece) ** 2, 1e-10)))
        start += hop
    return np.array(rows).reshape(-1, filters)


def naive_samples(energies, mean, deviation, context):
    rows = (energies - mean) / deviation
    return np.array(
        [
            [rows[min(max(frame + offset, 0), len(rows) - 1)] for offset in range(-(context // 2), context // 2 + 1)]
            for frame in range(len(rows))
        ]
    )


# --- material ---


def speech(seed, seconds=0.3):
    """Return a tone that wanders, in noise: float64 in -1 ... 1."""
    random = np.random.default_rng(seed)
    times = np.arange(round(RATE * seconds)) / RATE
    return 0.5 * np.sin(2 * np.pi * (300 + 400 * random.random() * (1 + times)) * times) + 0.02 * random.normal(
        size=len(times)
    )


def wav(signal, rate=RATE, channels=1):
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.rint(np.asarray(signal) * 32767).astype("<i2").tobytes())
    return content.getvalue()


def stored(signal):
    """Return what a 16-bit file keeps of a signal."""
    return np.rint(signal * 32767) / 32768


def tar(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def digits(tmp_path):
    """Two speakers, three digits, as a directory."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    for number, (digit, speaker) in enumerate((d, s) for s in ("ann", "bob") for d in (0, 1, 4)):
        (folder / f"{digit}_{speaker}_{number}.wav").write_bytes(wav(speech(number, 0.2 + 0.03 * number)))
    (folder / "README.md").write_text("not a recording")
    return folder


def contents(path):
    with Source.open(path, 64) as source:
        source.validate(full=True)
        batch = source.batch(np.arange(source.samples))
        return np.moveaxis(batch.inputs, -1, 0), batch.targets


def attributes(path):
    with h5py.File(path) as file:
        return dict(file.attrs) | {"classes": file["targets"].attrs["classes"]}


def run(*words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(word) for word in words]))


def refused(message, source, out, **options):
    """Expect a UserError, and neither a data file nor a temporary one."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError, match=message):
        import_wav(source, out, **options)
    assert sorted(out.parent.iterdir()) == before


# --- energies ---


@pytest.mark.parametrize(("rate", "transform", "filters"), [(8000, 256, 40), (16000, 512, 40), (11025, 512, 23)])
def test_filter_bank_equals_its_definition(rate, transform, filters):
    weights = filter_bank(rate, transform, filters)
    bins = range(transform // 2 + 1)
    expected = [[naive_filter(rate, transform, filters, f, b) for b in bins] for f in range(filters)]
    np.testing.assert_allclose(weights, expected, atol=1e-6)
    assert (weights.sum(axis=1) > 0).all(), "every filter hears something"
    between = slice(*np.searchsorted(np.arange(transform // 2 + 1) * rate / transform, (100, 0.9 * rate / 2)))
    np.testing.assert_allclose(weights.sum(axis=0)[between], 1, atol=1e-12)


@pytest.mark.parametrize("rate", [8000, 11025, 16000])
@pytest.mark.parametrize("length", [0, 199, 1103, 2000])
def test_log_mel_equals_the_sums(monkeypatch, rate, length):
    monkeypatch.setattr("dbmpi.data.importers.mel.FRAMES_AT_ONCE", 4)
    signal = np.random.default_rng(length).normal(scale=0.1, size=length).astype(np.float32)
    signal[1000:] = 0  # silence must stay finite
    found = LogMel(rate)(signal)
    np.testing.assert_allclose(found, naive_log_mel(signal.astype(np.float64), rate), rtol=1e-4, atol=1e-3)


def test_tones_are_heard_in_their_filters():
    times = np.arange(RATE) / RATE
    loudest = [
        int(LogMel(RATE)(np.sin(2 * np.pi * hertz * times).astype(np.float32)).mean(axis=0).argmax())
        for hertz in (200, 400, 800, 1600, 3200)
    ]
    step = 2595 * math.log10(1 + RATE / 2 / 700) / 41
    places = [2595 * math.log10(1 + hertz / 700) / step - 1 for hertz in (200, 400, 800, 1600, 3200)]
    np.testing.assert_allclose(loudest, places, atol=1)


# --- files ---


@pytest.mark.parametrize("context", [1, 11])
def test_what_is_written_equals_the_twin(tmp_path, digits, monkeypatch, context):
    monkeypatch.setattr("dbmpi.data.hdf5.BLOCK_BYTES", 20_000)  # several blocks of a recording
    outs = tmp_path / "train.h5", tmp_path / "test.h5"
    written = import_wav(digits, outs[0], test_out=outs[1], test_speakers=["bob"], context=context)
    energies = {
        (speaker, digit): naive_log_mel(stored(speech(number, 0.2 + 0.03 * number)), RATE)
        for number, (digit, speaker) in enumerate((d, s) for s in ("ann", "bob") for d in (0, 1, 4))
    }
    train = np.concatenate([rows for (speaker, _), rows in energies.items() if speaker == "ann"])
    about = attributes(outs[0])
    np.testing.assert_allclose(about["mean"], train.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(about["deviation"], train.std(axis=0), rtol=1e-4)
    assert (about["rate"], about["context"], about["states"], about["classes"]) == (RATE, context, 3, 15)
    for out, speaker, summary in zip(outs, ("ann", "bob"), written, strict=True):
        inputs, targets = contents(out)
        expected = [
            naive_samples(energies[speaker, digit], train.mean(axis=0), train.std(axis=0), context)
            for digit in (0, 1, 4)
        ]
        np.testing.assert_allclose(inputs, np.concatenate(expected), atol=2e-3)
        thirds = [
            [3 * d + 3 * t // len(rows) for t in range(len(rows))] for d, rows in zip((0, 1, 4), expected, strict=True)
        ]
        np.testing.assert_array_equal(targets, np.concatenate(thirds))
        assert summary.samples == len(inputs)
        np.testing.assert_array_equal(attributes(out)["mean"], about["mean"])


def test_an_archive_gives_what_the_directory_gives(tmp_path, digits, capsys):
    import_wav(digits, tmp_path / "directory.h5")
    files = {f"deep/er/{path.name}": path.read_bytes() for path in sorted(digits.iterdir())}
    for name, mode in (("plain.tar", "w"), ("packed.tgz", "w:gz")):
        out = tmp_path / f"{name}.h5"
        assert run("import", "wav", tar(tmp_path / name, files, mode), "--out", out) == 0
        assert "samples of 11 x 40 (float32), 15 classes" in capsys.readouterr().out
        for found, expected in zip(contents(out), contents(tmp_path / "directory.h5"), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_a_test_file_made_later_is_the_same(tmp_path, digits):
    together = tmp_path / "train.h5", tmp_path / "test.h5"
    run("import", "wav", digits, "--out", together[0], "--test-out", together[1], "--test-speakers", "bob")
    bob = tmp_path / "bob"
    bob.mkdir()
    for path in digits.glob("*_bob_*"):
        (bob / path.name).write_bytes(path.read_bytes())
    run("import", "wav", bob, "--out", tmp_path / "later.h5", "--like", together[0])
    for found, expected in zip(contents(tmp_path / "later.h5"), contents(together[1]), strict=True):
        np.testing.assert_array_equal(found, expected)
    out = tmp_path / "out.h5"
    refused(r"--states 2 was given, but .*train.h5 has 3; leave it out", bob, out, like=together[0], states=2)
    with h5py.File(together[0], "a") as file:
        file.attrs["deviation"] = np.zeros(40)
    refused("train.h5: its rate, states, mean or deviation are impossible", bob, out, like=together[0])
    with h5py.File(together[0], "a") as file:
        del file.attrs["deviation"]
    refused("train.h5: does not say how its frames were made", bob, out, like=together[0])


def test_a_table_says_where_which_label_is(tmp_path, digits):
    table = tmp_path / "table.csv"
    rows = [
        ("Start", "end", "file", "label", "speaker"),
        ("0.1", "0.2", "0_ann_0.wav", "7", "x"),
        ("0", "0.05", "0_ann_0.wav", "2", "x"),
        ("0", "inf", "4_bob_5.wav", "1", "y"),
    ]
    with table.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    out = tmp_path / "out.h5"
    written = import_wav(digits, out, table=table, test_out=tmp_path / "y.h5", test_speakers=["y"], classes=9)
    _, targets = contents(out)
    centres = [0.0125 + 0.01 * frame for frame in range(LogMel(RATE).frames(1600))]
    expected = [2 if at < 0.05 else 7 for at in centres if at < 0.05 or 0.1 <= at < 0.2]
    np.testing.assert_array_equal(targets, expected)
    assert [each.shape.classes for each in written] == [9, 9]
    assert set(contents(tmp_path / "y.h5")[1]) == {1}
    import_wav(digits, out, table=table, states=2, force=True)
    assert set(contents(out)[1]) == {4, 5, 14, 15, 2, 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0_ann_0.wav,1\n", "its first line is '0_ann_0.wav,1'; expected the names of the columns"),
        ("file,start,label\nx,0,1\n", "expected the names of the columns"),
        ("file,label\n", "names no recordings"),
        ("file,label\n0_ann_0.wav,1.5\n", "line 2: the label '1.5' is not a class"),
        ("file,label\n0_ann_0.wav\n", "line 2 has 1 columns; expected 2"),
        ("file,label\n0_ann_0.wav,1\nmissing.wav,1\n", "1 of its 2 recordings were not found, e.g. missing.wav"),
        ("file,start,end,label\n0_ann_0.wav,0.2,0.1,1\n", r"goes from 0.2 s to 0.1 s"),
        ("file,start,end,label\n0_ann_0.wav,a,0.1,1\n", "'a' is not a time"),
        ("file,start,end,label\n0_ann_0.wav,0,0.1,1\n0_ann_0.wav,0.05,1,1\n", "segments of 0_ann_0.wav overlap"),
    ],
)
def test_tables_that_are_wrong(tmp_path, digits, text, message):
    table = tmp_path / "table.csv"
    table.write_text(text)
    refused(message, digits, tmp_path / "out.h5", table=table)


# --- encodings ---


def test_widths_channels_and_rates(tmp_path):
    signal = speech(1)
    encodings = {
        "u1": np.rint(signal * 127 + 128).astype(np.uint8),
        "i2": np.rint(signal * 32767).astype(np.int16),
        "i4": np.rint(signal * (2**31 - 1)).astype(np.int32),
        "f4": signal.astype(np.float32),
        "f8": signal,
        "stereo": np.stack([signal * 1.5, signal * 0.5], axis=1).astype(np.float32),
    }
    for name, samples in encodings.items():
        content = io.BytesIO()
        scipy.io.wavfile.write(content, RATE, samples)
        found, rate = decoded(Recording(name, name, content.getvalue()), None)
        assert (found.dtype, rate) == (np.float32, RATE)
        np.testing.assert_allclose(found, signal, atol=0.01 if name == "u1" else 1e-4, err_msg=name)
    three = np.rint(signal * (2**23 - 1)).astype("<i4").view(np.uint8).reshape(-1, 4)[:, :3].tobytes()
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setparams((1, 3, RATE, 0, "NONE", ""))
        file.writeframes(three)
    np.testing.assert_allclose(decoded(Recording("", "", content.getvalue()), None)[0], signal, atol=1e-5)


def test_other_rates_are_refused_or_resampled(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, rate in (("0_a_0", RATE), ("1_a_0", 2 * RATE)):
        tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate // 2) / rate)
        (folder / f"{name}.wav").write_bytes(wav(tone, rate))
    out = tmp_path / "out.h5"
    refused("1_a_0.wav: has 16000 samples a second, but others have 8000; to resample, say --rate 8000", folder, out)
    import_wav(folder, out, rate=RATE)
    inputs, targets = contents(out)
    halves = [inputs[targets // 3 == digit][10:30, 5] * attributes(out)["deviation"] for digit in (0, 1)]
    peak = halves[0][0].argmax()
    np.testing.assert_allclose(halves[0][:, peak], halves[1][:, peak], atol=0.01)


# --- strangers ---


def damaged(content, place, value):
    return content[:place] + value + content[place + len(value) :]


def test_recordings_that_are_torn_or_wrong(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    good, path, out = wav(speech(0)), folder / "3_ann_0.wav", tmp_path / "out.h5"
    for content, message in {
        b"": "cannot be read as WAV",
        good[:20]: "cannot be read as WAV",
        good[:-100]: "3_ann_0.wav: is torn: Reached EOF prematurely",
        b"not sound at all" * 9: "cannot be read as WAV",
        damaged(good, 20, b"\x55\0"): "cannot be read as WAV",  # MP3
        damaged(good, 22, b"\0\0"): "cannot be read as WAV",  # no channels
        damaged(good, 34, b"\x63\0"): "cannot be read as WAV",  # 99 bits
        wav(speech(0), rate=100): "has 100 samples a second; expected 4000",
        wav(speech(0, 0.01)): "holds no labelled frames to learn from",
    }.items():
        path.write_bytes(content)
        refused(message, folder, out)
    sound = io.BytesIO()
    scipy.io.wavfile.write(sound, RATE, np.array([0, math.nan], np.float32))
    path.write_bytes(sound.getvalue())
    refused("3_ann_0.wav: holds NaN", folder, out)
    path.rename(folder / "three.wav")
    refused("the name holds neither label nor speaker; expected label_speaker_number.wav", folder, out)


def test_options_that_are_wrong(tmp_path, digits):
    out = tmp_path / "out.h5"
    test = {"test_out": tmp_path / "test.h5", "test_speakers": ["zoe"]}
    refused("no speaker is called 'zoe'; the speakers are ann, bob", digits, out, **test)
    refused("--test-out and --test-speakers go together", digits, out, test_speakers=["bob"])
    refused("expected two files", digits, out, test_out=out, test_speakers=["bob"])
    refused("that are not of the test speakers", digits, out, **test | {"test_speakers": ["ann", "bob"]})
    refused("a context of 4 frames was given; expected an odd number", digits, out, context=4)
    refused("a rate of 5 was given", digits, out, rate=5)
    refused("no such file or directory", tmp_path / "nothing", out)
    refused("holds no labelled frames", tmp_path / "empty", out) if (tmp_path / "empty").mkdir() else None
    table = tmp_path / "table.csv"
    table.write_text("file,label\n0_ann_0.wav,1\n")
    refused("does not name the speakers; add a column speaker", digits, out, table=table, **test)


def test_archives_that_are_torn_or_wrong(tmp_path, monkeypatch):
    files = {f"{digit}_ann_0.wav": wav(speech(digit)) for digit in range(3)}
    good, path, out = tar(tmp_path / "good.tar", files).read_bytes(), tmp_path / "bad.tar", tmp_path / "out.h5"
    second = good.index(b"1_ann_0.wav")
    for content, message in {
        b"hello" * 500: "cannot be read as a tar: .*; expected WAV files, a directory of them, or a tar",
        b"": "cannot be read as a tar",
        good[: second + 2000]: "bad.tar: after . recordings cannot be read as a tar: unexpected end of data",
        good[:second]: "after 1 recordings cannot be read as a tar",
        good[: second + 300]: "after 1 recordings cannot be read as a tar",
        damaged(good, second, b"7"): "after 1 recordings cannot be read as a tar: bad checksum",
        gzip.compress(good)[:-900]: "gzip data are torn or damaged",
    }.items():
        path.write_bytes(content)
        refused(message, path, out)
    monkeypatch.setattr(reading, "LARGEST_RECORDING", 4000)
    refused("'0_ann_0.wav' has 4844 bytes; expected at most 0 MiB: cut", tmp_path / "good.tar", out)
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 64 << 20
    path.write_bytes(gzip.compress(header.tobuf(tarfile.USTAR_FORMAT) + bytes(64 << 20)))
    refused("the headers before byte .* do not end: damaged", path, out)


def test_names_in_an_archive_are_not_paths(tmp_path):
    place = tmp_path / "work"
    place.mkdir()
    names = ["../../0_ann_0.wav", str(tmp_path / "1_ann_0.wav"), "a/\n\x1b[31m/2_ann_0.wav"]
    archive = tar(place / "in.tar", {name: wav(speech(number)) for number, name in enumerate(names)})
    with tarfile.open(archive, "a") as more:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo("3_ann_0.wav")
            member.type, member.linkname = kind, "/etc/passwd"
            more.addfile(member)
    assert import_wav(archive, place / "out.h5")[0].shape.classes == 9
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["in.tar", "out.h5", "work"]


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_damaged_bytes_are_a_user_error_or_harmless(tmp_path, data):
    content = bytearray(
        tar(tmp_path / "good.tar", {"0_a_0.wav": wav(speech(0, 0.05)), "1_a_0.wav": wav([0.1] * 300)}).read_bytes()
    )
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.one_of(st.integers(0, 600), st.integers(0, len(content) - 1)))
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "bad.tar"
    path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    told = "nothing wrong with bad.tar"
    try:
        for recording in recordings(path, no_progress):
            signal, rate = decoded(recording, None)
            assert np.isfinite(LogMel(rate)(signal)).all()
    except UserError as error:
        told = str(error)
    assert "bad.tar" in told


@pytest.mark.skipif(not FSDD.exists(), reason="needs the data set fsdd (DBMPI_TEST_DATA)")
def test_spoken_digits(tmp_path):
    """A part of the real archive: samples as the standard library reads them, and states that can be told apart."""
    files = {}
    with tarfile.open(FSDD) as archive:
        for member in archive:
            if "_jackson_" in member.name and member.name.endswith(tuple(f"_{number}.wav" for number in range(8))):
                files[member.name] = archive.extractfile(member).read()
    assert len(files) == 80
    for name, content in files.items():
        with wave.open(io.BytesIO(content)) as file:
            expected = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
        np.testing.assert_array_equal(decoded(Recording(name, name, content), None)[0], expected.astype(np.float32))
    train, test = tmp_path / "train.h5", tmp_path / "test.h5"
    later = {name: content for name, content in files.items() if name.endswith(("_6.wav", "_7.wav"))}
    first = {name: content for name, content in files.items() if name not in later}
    import_wav(tar(tmp_path / "first.tar", first), train)
    import_wav(tar(tmp_path / "later.tar", later), test, like=train)
    (inputs, targets), (others, answers) = contents(train), contents(test)
    assert set(targets) == set(answers) == set(range(30))
    means = np.stack([inputs[targets == state].mean(axis=0) for state in range(30)])
    nearest = [((means - other) ** 2).sum(axis=(1, 2)).argmin() for other in others]
    assert np.mean(nearest == answers) > 10 / 30, "nearest means must do much better than a guess"
