"""What samples stand for: read from data files, kept in checkpoints, compared, and never mistaken in silence."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from unit import checkpoint_files
from unit.test_evaluate import INPUT_SHAPE, SAMPLES, make_data, naive, refused, run, train

from dbmpi.checkpoint.meaning import Agreement, Meaning, agree, check_same_data
from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.cli.main import main
from dbmpi.data.importers.csv import import_csv
from dbmpi.data.importers.libsvm import import_libsvm
from dbmpi.data.source import Source
from dbmpi.errors import UserError

PIXELS = np.random.default_rng(8).integers(0, 256, (SAMPLES, *INPUT_SHAPE), dtype=np.uint8)
NAMES = ("cat", "dog", "emu", "fox", "gnu")


def declare(path: Path, labels=None, scale=None, inputs=None) -> Path:
    """Say in a data file what its samples stand for."""
    with h5py.File(path, "r+") as file:
        if labels is not None:
            file["targets"].attrs["labels"] = labels
        if inputs is not None:
            del file["inputs"]
            file["inputs"] = inputs
        if scale is not None:
            file["inputs"].attrs["scale"] = scale
    return path


def meaning(path: Path) -> Meaning:
    with Source.open(path, 100) as source:
        return source.meaning


def learned(place: Path, labels=None, scale=None, inputs=None) -> tuple[dict[str, np.ndarray], Meaning]:
    """Write a checkpoint that has learned from such data, in ``place/run``; return its parameters, and the meaning."""
    make_data(place / "train.h5")
    said = meaning(declare(place / "train.h5", labels, scale, inputs))
    return train(place / "run", meaning=said), said


# Labels


def translated(theirs, mine, classes) -> tuple[int, ...] | str:
    """Return the learned class of each class, or why there is none: the rules, written down naively."""
    if not mine:
        return tuple(range(classes[1]))
    if not theirs:
        if all(isinstance(label, int) and 0 <= label < classes[0] for label in mine):
            return tuple(mine)
        return tuple(range(classes[1])) if classes[0] == classes[1] else "refused"
    return tuple(theirs.index(label) for label in mine) if set(mine) <= set(theirs) else "refused"


def test_labels_are_translated_by_name():
    texts = [("a", "b", "c"), ("c", "b", "a"), ("a", "c"), ("b",), ("d", "a"), ()]
    numbers = [(-1, 1, 7), (7, -1), (0, 1, 2), (1, 2), (2,), (5, 6, 7), (5,), ()]
    for theirs, mine in (*itertools.product(texts, texts), *itertools.product(numbers, numbers)):
        classes = (len(theirs) or 3, len(mine) or 2)
        expected = translated(theirs, mine, classes)
        given = Meaning(labels=mine)
        if expected == "refused":
            with pytest.raises(UserError) as caught:
                agree(Meaning(labels=theirs), given, learner="L", file="F", classes=classes)
            assert all(str(label) in str(caught.value) for label in (*theirs, *mine))
            continue
        found = agree(Meaning(labels=theirs), given, learner="L", file="F", classes=classes)
        assert (found.codes or tuple(range(classes[1]))) == expected, (theirs, mine)


def test_what_is_not_known_is_said():
    for theirs, mine, text in (((5, 6), (), "taken for 5, 6"), ((), (2, 1), "taken for the classes")):
        found = agree(Meaning(labels=theirs), Meaning(labels=mine), learner="L", file="F", classes=(3, 2))
        assert text in found.notices[0]
    assert agree(Meaning(), Meaning(), learner="L", file="F", classes=(3, 2)) == Agreement()
    assert "does not say" in agree(None, Meaning(labels=(4,)), learner="L", file="F", classes=(3, 1)).notices[0]


@pytest.mark.parametrize("labels", [NAMES, (-3, 1, 4, 15, 92)])
def test_a_test_file_with_fewer_labels_is_evaluated_by_their_names(tmp_path, capsys, labels):
    tensors, _ = learned(tmp_path, labels)
    inputs, classes = make_data(tmp_path / "test.h5", classes=2)
    declare(tmp_path / "test.h5", [labels[3], labels[1]])
    right = int((naive(tensors, inputs).argmax(axis=1) == np.array([3, 1])[classes]).sum())
    assert right != int((naive(tensors, inputs).argmax(axis=1) == classes).sum())
    found = json.loads(run(capsys, "evaluate", tmp_path / "run", "--data", tmp_path / "test.h5", "--json"))
    assert found["correct"] == right
    declare(tmp_path / "test.h5", [labels[3], type(labels[0])(77)])
    message = refused(capsys, "evaluate", tmp_path / "run", "--data", tmp_path / "test.h5")
    assert f"{labels[3]}, 77" in message
    assert ", ".join(map(str, labels)) in message


def test_numbers_of_classes_where_texts_were_learned(tmp_path, capsys):
    """Numbers are no texts, so that they can only be those of the classes, as without any labels."""
    tensors, _ = learned(tmp_path, NAMES)
    inputs, classes = make_data(tmp_path / "test.h5")
    with h5py.File(tmp_path / "test.h5", "r+") as file:
        del file["targets"].attrs["classes"]
    assert main(["evaluate", str(tmp_path / "run"), "--data", str(tmp_path / "test.h5"), "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["correct"] == int((naive(tensors, inputs).argmax(axis=1) == classes).sum())
    assert "does not say which labels its classes stand for; they are taken for cat, dog, emu, fox, gnu" in said.err
    with h5py.File(tmp_path / "test.h5", "r+") as file:
        file["targets"][0] = 5
    assert "6 classes" in refused(capsys, "evaluate", tmp_path / "run", "--data", tmp_path / "test.h5")
    learned(tmp_path, (1, 2, 3, 4, 5))
    assert "label 0 of sample" in refused(capsys, "evaluate", tmp_path / "run", "--data", tmp_path / "test.h5")


def test_a_file_of_libsvm_imported_without_like(tmp_path, capsys):
    (tmp_path / "train").write_text("".join(f"{label} 1:{label} 12:1\n" for label in (4, 0, 2, 1, 3)))
    (tmp_path / "test").write_text("3 1:3 12:1\n1 1:1 12:1\n3 1:3 12:1\n")
    import_libsvm(tmp_path / "train", tmp_path / "train.h5")
    import_libsvm(tmp_path / "test", tmp_path / "test.h5")
    with Source.open(tmp_path / "test.h5", 1) as source:
        raw = source.targets(np.arange(3)).tolist()
        assert source.expect_like(Source.open(tmp_path / "train.h5", 1)) == ()
        assert (raw, source.targets(np.arange(3)).tolist()) == ([1, 0, 1], [3, 1, 3])


@pytest.mark.parametrize("labels", [NAMES, (-3, 1, 4, 15, 92)])
def test_predictions_have_the_users_labels_and_say_what_they_are(tmp_path, capsys, labels):
    tensors, _ = learned(tmp_path, labels)
    inputs, _ = make_data(tmp_path / "data.h5", targets=None)
    best = naive(tensors, inputs).argmax(axis=1)
    run(capsys, "predict", tmp_path / "run", "--data", tmp_path / "data.h5", "--out", tmp_path / "out.h5")
    with h5py.File(tmp_path / "out.h5") as file:
        written = file["labels"].asstr()[()] if labels == NAMES else file["labels"][()]
        assert written.tolist() == [labels[place] for place in best]
        names = file["class_labels"].asstr()[()] if labels == NAMES else file["class_labels"][()]
        assert tuple(names.tolist()) == labels
        assert file["outputs"].attrs["kind"] == b"probabilities"
        assert b"softmax" in file["outputs"].attrs["description"]


def test_a_sample_without_a_class_has_no_label(tmp_path, capsys):
    for labels, none in (((-1, 0, 1, 2, 3), -(2**63)), (NAMES, b"")):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        learned(tmp_path, labels)
        with h5py.File(os.path.realpath(tmp_path / "run" / "checkpoints" / "latest"), "r+") as file:
            checkpoint_files.as_version_1(file)
            file["parameters/dense3/bias"][0] = np.nan
        words = ("predict", tmp_path / "run", "--data", tmp_path / "train.h5", "--out", tmp_path / "out.h5", "--force")
        assert main([str(word) for word in words]) == 1
        with h5py.File(tmp_path / "out.h5") as file:
            assert set(file["labels"][()].tolist()) == {none}
            assert labels == NAMES or file["labels"].attrs["_FillValue"] == none
    capsys.readouterr()


@pytest.mark.parametrize("labels", [(7, 8), NAMES[:2]])
def test_outputs_without_a_class_have_no_label(tmp_path, capsys, labels):
    make_data(tmp_path / "data.h5", classes=2)
    said = meaning(declare(tmp_path / "data.h5", labels))
    tensors = train(tmp_path / "run", loss="logistic", classes=2, meaning=said)
    inputs, _ = make_data(tmp_path / "data.h5", classes=2)
    best = naive(tensors, inputs).argmax(axis=1)
    assert {2, 3} <= set(best.tolist())
    run(capsys, "predict", tmp_path / "run", "--data", tmp_path / "data.h5", "--out", tmp_path / "out.h5")
    with h5py.File(tmp_path / "out.h5") as file:
        written = file["labels"].asstr()[()] if labels[0] == "cat" else file["labels"][()]
        none = "" if labels[0] == "cat" else file["labels"].attrs["_FillValue"]
        assert written.tolist() == [labels[place] if place < 2 else none for place in best]


@pytest.mark.parametrize(
    ("loss", "classes", "kind"),
    [("logistic", 5, "independent probabilities"), ("squared", 5, "scores"), ("squared", 0, "values")],
)
def test_what_other_losses_predict(tmp_path, capsys, loss, classes, kind):
    train(tmp_path / "run", loss=loss, classes=classes)
    make_data(tmp_path / "data.h5", targets=None)
    run(capsys, "predict", tmp_path / "run", "--data", tmp_path / "data.h5", "--out", tmp_path / "out.h5")
    with h5py.File(tmp_path / "out.h5") as file:
        assert file["outputs"].attrs["kind"].decode() == kind
        assert "labels" not in file


# Inputs


def test_bytes_of_another_scale_are_refused(tmp_path, capsys):
    learned(tmp_path, inputs=PIXELS)
    test = tmp_path / "test.h5"
    make_data(test)
    declare(test, inputs=PIXELS, scale=1 / 255)
    run(capsys, "evaluate", tmp_path / "run", "--data", test)
    declare(test, scale=1 / 128)
    for words in (("evaluate",), ("predict", "--out", tmp_path / "out.h5")):
        message = refused(capsys, words[0], tmp_path / "run", "--data", test, *words[1:])
        assert "times 0.00392156863" in message
        assert "by 0.0078125" in message
    assert not (tmp_path / "out.h5").exists()


def test_packed_bytes_have_a_scale_of_each_file(tmp_path, capsys):
    """As netCDF packs: what counts are the values."""
    values = np.round(PIXELS / 255, 2)
    for name, scale, offset in (("train", 0.01, 0.0), ("test", 0.005, -0.1)):
        make_data(tmp_path / f"{name}.h5")
        declare(tmp_path / f"{name}.h5", inputs=np.rint((values - offset) / scale).astype(np.uint8))
        with h5py.File(tmp_path / f"{name}.h5", "r+") as file:
            file["inputs"].attrs.update(scale_factor=scale, **({"add_offset": offset} if offset else {}))
    train(tmp_path / "run", meaning=meaning(tmp_path / "train.h5"))
    losses = [
        json.loads(run(capsys, "evaluate", tmp_path / "run", "--data", tmp_path / f"{name}.h5", "--json"))["loss"]
        for name in ("train", "test")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("scale", [1 / 255, 1.0])
def test_floats_that_were_not_scaled_as_the_bytes_were_are_refused(tmp_path, capsys, scale):
    learned(tmp_path, inputs=PIXELS, scale=scale)
    test = tmp_path / "test.h5"
    make_data(test)
    words = ("evaluate", tmp_path / "run", "--data", test, "--json")
    declare(test, inputs=PIXELS * np.float32(scale))
    found = json.loads(run(capsys, *words))
    declare(test, inputs=PIXELS)
    declare(test, scale=scale)
    assert found["loss"] == pytest.approx(json.loads(run(capsys, *words))["loss"], rel=1e-4)
    declare(test, inputs=PIXELS * np.float32(1 if scale < 1 else 1 / 255))
    assert f"bytes times {scale:.6g}, from 0 to" in refused(capsys, *words)
    declare(test, inputs=(PIXELS * np.float32(scale) - 127 * scale))
    assert "floats, from -" in refused(capsys, *words)
    # The other way round: learned from floats, given bytes.
    floats, pixels = Meaning(elements="floats", highest=1.0), Meaning(elements="bytes", scale=1.0, highest=255.0)
    with pytest.raises(UserError, match="store them as floats"):
        agree(floats, pixels, learner="L", file="F")


def test_floats_of_another_size_are_doubted(tmp_path, capsys):
    learned(tmp_path)
    make_data(tmp_path / "test.h5")
    with h5py.File(tmp_path / "test.h5", "r+") as file:
        file["inputs"][...] *= 255
    assert main(["evaluate", str(tmp_path / "run"), "--data", str(tmp_path / "test.h5")]) == 0
    assert "warning: the inputs of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("theirs", "mine", "text"),
    [
        ({"mean": (1.0, 2.0), "deviation": (1.0, 1.0)}, {"mean": (1.0, 2.5), "deviation": (1.0, 1.0)}, "another mean"),
        ({"mean": (1.0,), "deviation": (1.0,)}, {"mean": (1.0,), "deviation": (2.0,)}, "another deviation"),
        ({"input_names": ("a", "b")}, {"input_names": ("b", "a")}, "in another order: b, a instead of a, b"),
        ({"input_names": ("a", "b")}, {"input_names": ("a", "c")}, "'c' is not in both"),
        ({"target_names": ("a", "b")}, {"target_names": ("b", "a")}, "same targets"),
        ({"axes": ("map", "row", "column")}, {"axes": ("row", "column", "map")}, "transpose"),
    ],
)
def test_other_inputs_are_refused(theirs, mine, text):
    with pytest.raises(UserError, match=text):
        agree(Meaning(**theirs), Meaning(**mine), learner="L", file="F")
    for one in (theirs, mine):
        assert agree(Meaning(**one), Meaning(**one), learner="L", file="F") == Agreement()
        assert agree(Meaning(), Meaning(**one), learner="L", file="F") == Agreement()


def test_what_importers_and_others_say_is_read(tmp_path):
    (tmp_path / "table.csv").write_text("width,height,price,rent\n1,2,3,4\n5,6,7,9\n")
    import_csv(tmp_path / "table.csv", tmp_path / "table.h5", targets=("rent", "price"), kind="values")
    said = meaning(tmp_path / "table.h5")
    assert (said.input_names, said.target_names) == (("width", "height"), ("rent", "price"))
    assert (said.elements, said.lowest, said.highest) == ("floats", 0, 6)
    assert said.content.startswith("sha256:")
    make_data(tmp_path / "own.h5")
    with h5py.File(tmp_path / "own.h5", "r+") as file:
        file["targets"].attrs["labels"] = np.array(NAMES, "S3")
        file.attrs["mean"], file.attrs["deviation"] = 0.5, [1, 2]
        for place, name in enumerate(("sample", "row", "column")):
            file["inputs"].dims[place].label = name
    said = meaning(tmp_path / "own.h5")
    assert (said.labels, said.axes) == (NAMES, ("row", "column"))
    assert (said.mean, said.deviation, said.content) == ((0.5,), (1.0, 2.0), "")


@pytest.mark.parametrize(
    "labels",
    [
        ["a", "b"],
        ["a", "a", "b", "c", "d"],
        [1.5] * 5,
        np.zeros((5, 1), int),
        "abc",
        h5py.Empty("i4"),
        np.array([2**63] * 5),
    ],
)
def test_labels_that_are_none_are_not_taken(tmp_path, labels):
    make_data(tmp_path / "own.h5")
    with h5py.File(tmp_path / "own.h5", "r+") as file:
        file["targets"].attrs["labels"] = labels
        file.attrs["mean"] = [np.nan, 1]
        file["input_names"] = np.zeros((3,), "S4")
        file.attrs["digest"] = [1, 2]
    said = meaning(tmp_path / "own.h5")
    assert (said.labels, said.mean, said.input_names, said.content) == ((), (), (), "")


# The same data


def test_the_digest_is_that_of_what_is_learned_from(tmp_path):
    make_data(tmp_path / "a.h5")
    first = meaning(tmp_path / "a.h5")
    shutil.copy(tmp_path / "a.h5", tmp_path / "b.h5")
    os.utime(tmp_path / "b.h5", (1, 1))
    with h5py.File(tmp_path / "a.h5") as old, h5py.File(tmp_path / "packed.h5", "w") as new:
        new.create_dataset("inputs", data=old["inputs"][()].astype(">f8"), chunks=(7, 4, 3), compression="gzip")
        new["targets"] = old["targets"][()].astype(np.int16)
        new["targets"].attrs["classes"] = 5
    for same in ("b", "packed"):
        check_same_data(first, meaning(tmp_path / f"{same}.h5"), checkpoint="C", file="F")
    with Source.open(tmp_path / "a.h5", 100) as source:
        source.load()
        assert source.meaning == first
    for place, what in (((0, 0, 0), "inputs"), ((-1, 1, 2), "inputs"), (0, "targets")):
        shutil.copy(tmp_path / "a.h5", tmp_path / "c.h5")
        with h5py.File(tmp_path / "c.h5", "r+") as file:
            file[what][place] = (file[what][place] + 1) % 5
        with pytest.raises(UserError, match="other data with as many samples as F"):
            check_same_data(first, meaning(tmp_path / "c.h5"), checkpoint="C", file="F")
    check_same_data(None, first, checkpoint="C", file="F")  # written by an earlier version
    relabelled = first.model_copy(update={"labels": NAMES[::-1]})
    with pytest.raises(UserError, match="other data"):
        check_same_data(first.model_copy(update={"labels": NAMES}), relabelled, checkpoint="C", file="F")


def test_an_importers_digest_is_that_of_all_rows(tmp_path):
    lines = [f"{row % 3},{row},{row * row}" for row in range(5000)]

    def imported(name: str, end: str = "") -> Meaning:
        (tmp_path / name).write_text("\n".join(lines) + end)
        import_csv(tmp_path / name, tmp_path / f"{name}.h5", targets=("0",))
        return meaning(tmp_path / f"{name}.h5")

    first, again = imported("one"), imported("two")
    assert first == again
    lines[1234] = "1,0,0"  # no row that is looked at otherwise
    other = imported("three")
    assert other.digest == first.digest
    with pytest.raises(UserError, match="other data"):
        check_same_data(first, other, checkpoint="C", file="F")


def test_labels_and_names_that_a_checkpoint_cannot_hold(tmp_path):
    """In a checkpoint texts are as long as the longest, and what is longer than can be read must not be written."""
    labels = [f"{number}" for number in range(17000)]
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["inputs"] = np.ones((17000, 1), "i1")
        file["targets"] = np.array(labels, "S")
    assert len(meaning(tmp_path / "data.h5").labels) == 17000
    with h5py.File(tmp_path / "data.h5", "r+") as file:
        del file["targets"]
        file["targets"] = np.array([*labels[1:], "x" * 999], "S")
    with pytest.raises(
        UserError, match=r"17000 labels of up to 999 bytes; expected at most 16 MiB.*number the classes"
    ):
        meaning(tmp_path / "data.h5")
    with h5py.File(tmp_path / "wide.h5", "w") as file:
        file["inputs"] = np.ones((1, 17000), "i1")
        file["targets"] = [0]
        file["input_names"] = np.array([*labels[1:], "x" * 999], "S")
    assert meaning(tmp_path / "wide.h5").input_names == ()


# In checkpoints

EVERYTHING = Meaning(
    elements="bytes",
    scale=0.25,
    lowest=-1.5,
    highest=7.0,
    labels=("ä", "", "a longer one"),
    input_names=("one", "two"),
    target_names=("x",),
    axes=("row", "column"),
    mean=(1.0, 2.5),
    deviation=(3.0, 1e-9),
    digest="0123",
    content="sha256:4567",
)


@pytest.mark.parametrize("said", [None, Meaning(), EVERYTHING, EVERYTHING.model_copy(update={"labels": (-1, 2**62)})])
def test_checkpoints_keep_it(tmp_path, said):
    path = checkpoint_files.write(tmp_path, meaning=said)
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.info.meaning == said
    with h5py.File(path) as file:
        assert ("meaning" in file) == (said is not None)
        if said is EVERYTHING:
            assert file["meaning/labels"].asstr()[()].tolist() == list(said.labels)
            assert file["meaning/scale"][()] == 0.25
            assert file["meaning/mean"][()].tolist() == [1, 2.5]


@pytest.mark.parametrize(
    ("name", "value"),
    [("scale", np.nan), ("labels", np.zeros((2, 2), int)), ("scale", np.bytes_(b"text")), ("digest", 5)],
)
def test_a_meaning_that_is_none_is_refused(tmp_path, name, value):
    path = checkpoint_files.write(tmp_path, meaning=EVERYTHING)
    with h5py.File(path, "r+") as file:
        del file[f"meaning/{name}"]
        file[f"meaning/{name}"] = value
    with pytest.raises(UserError, match=f"meaning/{name}"):
        Checkpoint.open(path)


def test_inspect_shows_it(tmp_path, capsys):
    checkpoint_files.write(tmp_path, meaning=EVERYTHING)
    assert json.loads(run(capsys, "inspect", tmp_path, "--json"))["newest"]["meaning"]["scale"] == 0.25
    assert "a longer one" in run(capsys, "inspect", tmp_path)
