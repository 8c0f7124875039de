"""First values by name from files of other programs: the arrays that were written, or a message; never more memory."""

from __future__ import annotations

import io
import json
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.checkpoint_files import make_info

from dbmpi.checkpoint import named_arrays
from dbmpi.checkpoint.writer import CheckpointWriter
from dbmpi.errors import UserError
from dbmpi.index.layout import Layout, Tensor

LAYOUT = Layout((Tensor("a/weights", (3, 4)), Tensor("a/bias", (3,)), Tensor("scale", (1,))))
VECTOR = np.random.default_rng(1).normal(size=LAYOUT.size).astype(np.float32)
ARRAYS = LAYOUT.views(VECTOR)


def safetensors(arrays: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    """Return a file of safetensors, written as its specification says."""
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, (kind, shape, data) in arrays.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def plain(arrays: dict[str, np.ndarray], kind: str = "F32", dtype: str = "<f4") -> bytes:
    return safetensors({name: (kind, list(each.shape), each.astype(dtype).tobytes()) for name, each in arrays.items()})


def filled(path: Path, layout: Layout = LAYOUT, *, partly: bool = False, at_once: int = 5) -> np.ndarray:
    """Return the whole vector from a file, in ranges of so many; what the file lacks is 7."""
    found = np.full(layout.size, np.nan, np.float32)
    with named_arrays.opened(path) as stored:
        match = named_arrays.match(layout, stored, str(path), partly=partly)
        fill = named_arrays.filler(layout, match, str(path), lambda start, out: out.fill(7))
        for start in range(0, layout.size, at_once):
            fill(start, found[start : start + at_once])
    return found


def refused(path: Path, **options) -> str:
    with pytest.raises(UserError) as raised:
        filled(path, **options)
    return str(raised.value)


@pytest.mark.parametrize("at_once", [16, None], ids=["in parts", "at once"])
def test_what_was_written_is_read_from_every_kind_of_file(tmp_path, monkeypatch, at_once):
    if at_once is not None:
        monkeypatch.setattr(named_arrays, "_AT_ONCE", at_once)
    dotted = {name.replace("/", "."): each for name, each in ARRAYS.items()}
    np.savez(tmp_path / "plain.npz", **ARRAYS)
    dotted["a.weight"] = dotted.pop("a.weights")  # as in PyTorch
    doubles = {name: np.asfortranarray(each, np.float64) for name, each in dotted.items()}
    np.savez_compressed(tmp_path / "packed.npz", **doubles)
    (tmp_path / "single.safetensors").write_bytes(plain({**ARRAYS, "scale": ARRAYS["scale"].reshape(())}))
    (tmp_path / "double.safetensors").write_bytes(plain(dotted, "F64", "<f8"))
    with CheckpointWriter(tmp_path / "step-000000007.h5", LAYOUT) as writer:
        writer.write("parameters", 0, VECTOR)
        writer.commit(make_info(step=7))
    for name in ("plain.npz", "packed.npz", "single.safetensors", "double.safetensors", "step-000000007.h5", ""):
        for length in (5, LAYOUT.size):
            np.testing.assert_array_equal(filled(tmp_path / name, at_once=length), VECTOR, err_msg=name)
    nested = {"a": {"weights": ARRAYS["a/weights"], "bias": ARRAYS["a/bias"].tolist()}, "scale": np.float64(VECTOR[-1])}
    given_ = named_arrays.match(LAYOUT, named_arrays.given(nested, "it"), "it")
    out = np.empty_like(VECTOR)
    named_arrays.filler(LAYOUT, given_, "it", lambda *_: None)(0, out)
    np.testing.assert_array_equal(out, VECTOR)


@pytest.mark.parametrize(("kind", "dtype", "values"), [("F16", "<f2", None), ("BF16", "<u2", [0x3F80, 0xC000, 0x7F7F])])
def test_half_precision_is_exact(tmp_path, kind, dtype, values):
    layout = Layout((Tensor("x", (3,)),))
    raw = np.array([1, -2, 0.1], "<f2") if values is None else np.array(values, dtype)
    expected = raw.astype(np.float32) if values is None else np.float32([1, -2, 3.3895314e38])
    (tmp_path / "x.safetensors").write_bytes(safetensors({"x": (kind, [3], raw.tobytes())}))
    np.testing.assert_array_equal(filled(tmp_path / "x.safetensors", layout), expected)


def test_all_that_does_not_fit_is_told_at_once(tmp_path):
    path = tmp_path / "other.npz"
    np.savez(path, **{"a.weights": np.zeros((4, 3)), "a/bias": np.zeros(3, int), "more": np.zeros(2)})
    message = refused(path)
    for words in (
        "'a.weights' has shape (4, 3), the parameter (3, 4)",
        "'a/bias' is int64, expected floating-point numbers",
        "'more' is no parameter",
        "'scale' of shape (1,) is missing",
        'Set run.initial_names = "some"',
    ):
        assert words in message
    assert "'more'" not in refused(path, partly=True)
    np.savez(path, **{"a.bias": ARRAYS["a/bias"], "more": np.zeros(2)})
    some = filled(path, partly=True)
    np.testing.assert_array_equal(some, [*[7] * 12, *ARRAYS["a/bias"], 7])
    np.savez(path, more=np.zeros(2))
    assert "none of its names is one of the model's" in refused(path, partly=True)
    np.savez(path, **{**ARRAYS, "a.bias": np.zeros(3)})
    assert "is there twice" in refused(path)
    np.savez(path, **{**ARRAYS, "scale": np.array([1e300])})
    assert "'scale' are not all finite as float32" in refused(path)
    np.savez(path, **{**ARRAYS, "scale": np.zeros(1, np.longdouble)})
    assert f"'scale' is {np.dtype(np.longdouble).name}, expected floating-point numbers of up to 64" in refused(path)
    path = tmp_path / "other.safetensors"
    path.write_bytes(safetensors({"a.bias": ("float_x", [3], bytes(12))}))
    assert "'a.bias' is float_x, expected floating-point numbers" in refused(path, partly=True)


def test_files_that_may_run_code_or_fill_the_memory_are_refused(tmp_path):
    np.savez(tmp_path / "objects.npz", **{**ARRAYS, "scale": np.array([{}])})
    assert "'scale' is object" in refused(tmp_path / "objects.npz")
    for name in ("model.pt", "one.npy"):
        (tmp_path / name).write_bytes(b"")
        assert "may contain code" in refused(tmp_path / name)
    assert "no such file" in refused(tmp_path / "absent.npz")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2**40,)})
    with zipfile.ZipFile(tmp_path / "large.npz", "w") as archive:
        archive.writestr("a/bias.npy", header.getvalue())
    assert "has shape (1099511627776,)" in refused(tmp_path / "large.npz", partly=True)
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a/bias.npy", bytes(2**20))
    assert "is packed in another way" in refused(tmp_path / "bomb.npz")
    for text in ("-" * 9000, "{'descr': (", "{\n  'a'\n 'b':", "{'a'" * 200):  # each fails in another way
        with zipfile.ZipFile(tmp_path / "bad.npz", "w") as archive:
            archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode())
        assert "cannot be read (damaged file?)" in refused(tmp_path / "bad.npz")
    np.savez(tmp_path / "bad.npz", x=np.arange(3.0))
    damaged = (tmp_path / "bad.npz").read_bytes().replace(np.float64(1).tobytes(), np.float64(7).tobytes())
    (tmp_path / "bad.npz").write_bytes(damaged)
    assert "Bad CRC-32" in refused(tmp_path / "bad.npz", layout=Layout((Tensor("x", (3,)),)), at_once=3)
    large = {"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    for text in (
        json.dumps(large),
        "[" * 100_000,
        '{"x": 5}',
        '{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}',
    ):
        (tmp_path / "bad.safetensors").write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(8))
        assert "cannot be read (damaged file?)" in refused(tmp_path / "bad.safetensors")
    (tmp_path / "bad.safetensors").write_bytes((2**60).to_bytes(8, "little"))
    assert "its header has" in refused(tmp_path / "bad.safetensors")


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["x.npz", "x.safetensors"]), st.data())
def test_damage_is_a_message(tmp_path_factory, name, data):
    path = tmp_path_factory.mktemp("damaged") / name
    if name.endswith("z"):
        np.savez(path, **ARRAYS)
    else:
        path.write_bytes(plain(ARRAYS))
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole)
    with suppress(UserError):
        assert filled(path).shape == VECTOR.shape
