"""``dbmpi inspect``: the contents of a checkpoint, a run directory or a data file."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbmpi.cli import options
from dbmpi.data.importers.table import count
from dbmpi.errors import Damaged, UserError

if TYPE_CHECKING:
    from dbmpi.checkpoint.reader import Checkpoint
    from dbmpi.monitor.history import RunHistory

SUMMARY = "show what is in a checkpoint, a run directory or a data file"

_COLUMNS = ("min", "mean", "max", "std")
_TEXT_SHOWN = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its `parser`."""
    parser.add_argument(
        "path", type=Path, metavar="PATH", help="a checkpoint, a run directory (its newest checkpoint), or a data file"
    )
    options.add_json(parser)
    parser.add_argument(
        "--placement",
        action="store_true",
        help="PATH is a configuration: show how its network is cut over the partitions, what moves, and why",
    )
    parser.add_argument("--partitions", type=count, metavar="P", help="with --placement (default: topology.partitions)")
    options.add_input_shape(parser)
    options.add_allow_code(parser)


def run(arguments: argparse.Namespace) -> int:
    """Look at the file that these `arguments` name, print what it holds, and return the exit code."""
    if arguments.placement:
        print(_placement(arguments))
        return 0
    options.refuse_configuration(
        arguments.path,
        "inspect",
        "a checkpoint, a run directory or a data file",
        f"; how its network is cut: dbmpi inspect --placement {arguments.path}",
    )
    from rich.console import Console

    with Console(stderr=True).status("reading"):
        found = describe(arguments.path)
    if arguments.json:
        print(json.dumps(found, indent=2, allow_nan=False))
    else:
        for line in _lines(found):
            print(line)
    shown = found.get("newest", found)
    damaged = [array["name"] for array in shown["arrays"] if "damaged" in array]
    if damaged:
        raise UserError(
            f"{shown['path']}: damaged: {', '.join(damaged)}: some bytes are not those that were written; use another "
            "checkpoint"
        )
    return 0


def _placement(arguments: argparse.Namespace) -> str:
    """Return a table of how the network of a configuration is cut.

    Code of a user's own layers is not run unless the file is named: the configuration may be anybody's.
    """
    from dbmpi.config import reading
    from dbmpi.network.own import from_files
    from dbmpi.replica import placement
    from dbmpi.replica.describe import describe

    run = reading.read(arguments.path)
    load = from_files(arguments.allow_code)
    network = options.make_network(run.network, run.data, run.run.seed, arguments.input_shape, load)
    partitions = arguments.partitions or run.topology.partitions or 1
    placed = placement.from_config(run.placement, network.layers, partitions)
    head = f"{network.size:,} parameters over {_count(partitions, 'partition')}"
    samples = run.optimizer.batch_size
    return f"{head}; batches of {samples}\n\n{describe(network.layers, placed, samples)}"


def describe(path: Path) -> dict[str, Any]:
    """Return the contents of a path: ``kind`` is ``"run"``, ``"checkpoint"`` or ``"data"``.

    Raises
    ------
    UserError
        If it is neither, or cannot be read.
    """
    from dbmpi.checkpoint import directory
    from dbmpi.checkpoint.reader import Checkpoint

    if path.is_dir():
        folder, history = directory.checkpoints_directory(path), _history(path)
        with Checkpoint.open(path) as checkpoint:
            return {
                "kind": "run",
                "path": str(path),
                "notice": checkpoint.notice,
                "checkpoints": [_brief(candidate) for candidate in sorted(directory.checkpoints(folder))],
                "lost": [asdict(lost) for lost in history.lost] if history is not None else [],
                "newest": _checkpoint(checkpoint),
            }
    if not path.exists():
        raise UserError(f"{path}: no such file or directory; expected a checkpoint, a run directory or a data file")
    if path.name in directory.POINTERS or _is_checkpoint(path):
        with Checkpoint.open(path) as checkpoint:
            return _checkpoint(checkpoint)
    return _data(path)


def _history(directory: Path) -> RunHistory | None:
    """Return the history of a run, if it has records."""
    from dbmpi.monitor.history import RunHistory
    from dbmpi.monitor.records import read_records

    return RunHistory(read_records(directory)) if any((directory / "records").glob("*.jsonl")) else None


def _is_checkpoint(path: Path) -> bool:
    """Return whether an HDF5 file says of itself that it is a checkpoint; UserError if it is no HDF5 file."""
    import h5py

    from dbmpi.checkpoint.schema import FORMAT
    from dbmpi.checkpoint.untrusted import HDF5_ERRORS

    try:
        with h5py.File(path, "r", locking=False) as file:
            return bool(_attributes(file).get("attributes", {}).get("format") == FORMAT)
    except HDF5_ERRORS as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not an HDF5 file, or a torn one, expected a checkpoint or data: {reason}") from None


def _brief(path: Path) -> dict[str, Any]:
    from dbmpi.checkpoint.reader import Checkpoint

    try:
        with Checkpoint.open(path) as checkpoint:
            facts = {key: getattr(checkpoint.info, key) for key in ("step", "samples", "created")}
            return {"name": path.name, "bytes": path.stat().st_size, **facts}
    except (UserError, FileNotFoundError) as error:
        return {"name": path.name, "unreadable": str(error)}


def _checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    from dbmpi.checkpoint import statistics

    info = asdict(checkpoint.info)
    if checkpoint.info.meaning is not None:
        info["meaning"] = checkpoint.info.meaning.model_dump(exclude_defaults=True)
    with contextlib.suppress(ValueError, RecursionError):  # then it stays the text that it is
        info["configuration"] = json.loads(info["configuration"], parse_constant=str)
    arrays = []
    for vector in checkpoint.vectors:
        for tensor in checkpoint.layout.tensors:
            try:
                numbers = statistics.as_dict(statistics.of_tensor(checkpoint, vector, tensor))
            except Damaged as error:
                numbers = {"not_read": "damaged", "damaged": str(error)}
            name = tensor.name if vector == "parameters" else f"{vector}: {tensor.name}"
            arrays.append({"name": name, "shape": tensor.shape, "dtype": str(checkpoint.dtype), **numbers})
    for name, kind in checkpoint.state_arrays.items():
        try:
            numbers = statistics.as_dict(statistics.of_state(checkpoint, name))
        except Damaged as error:
            numbers = {"not_read": "damaged", "damaged": str(error)}
        arrays.append({"name": f"objective state: {name}", "shape": kind.shape, "dtype": str(kind.dtype), **numbers})
    return {
        "kind": "checkpoint",
        "path": str(checkpoint.path),
        "bytes": checkpoint.path.stat().st_size,
        "parameters": checkpoint.layout.size,
        "verified": checkpoint.has_checksums,
        **info,
        "arrays": arrays,
    }


def _data(path: Path) -> dict[str, Any]:
    import h5py

    from dbmpi.checkpoint import statistics
    from dbmpi.checkpoint.untrusted import HDF5_ERRORS

    arrays: list[dict[str, Any]] = []

    def visit(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset):
            numbers = statistics.as_dict(statistics.of_dataset(node))
            shape = list(node.shape or ())
            arrays.append({"name": name, "shape": shape, "dtype": str(node.dtype), **numbers, **_attributes(node)})

    try:
        with h5py.File(path, "r", locking=False) as file:
            attributes = _attributes(file)
            file.visititems(visit)  # every object once, and no links to other files
    except HDF5_ERRORS as error:
        raise UserError(f"{path}: the file cannot be read: {' '.join(str(error).split())}") from None
    return {"kind": "data", "path": str(path), "bytes": path.stat().st_size, **attributes, "arrays": arrays}


def _attributes(node: Any) -> dict[str, Any]:
    """Return the attributes of a file or dataset that are short texts or numbers."""
    import numpy as np

    found = {}
    for name in node.attrs:
        kept = node.attrs.get_id(name)
        if kept.shape is None or kept.get_storage_size() > 1024:
            continue
        value = node.attrs[name]
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        if isinstance(value, np.generic | np.ndarray) and value.dtype.kind in "iufb":
            found[name] = value.tolist() if np.isfinite(value).all() else str(value)  # JSON has no NaN
        elif isinstance(value, str):
            found[name] = value
    return {"attributes": found} if found else {}


def _lines(found: dict[str, Any]) -> Iterator[str]:
    if found["kind"] == "run":
        yield from _run_lines(found)
    elif found["kind"] == "checkpoint":
        yield from _checkpoint_lines(found)
    else:
        yield f"{_printable(found['path'])}  ({_size(found['bytes'])})"
        for name, value in found.get("attributes", {}).items():
            yield f"  {_printable(name)} = {_printable(value)}"
        yield ""
        yield from _array_lines(found["arrays"])


def _run_lines(found: dict[str, Any]) -> Iterator[str]:
    yield f"{_printable(found['path'])}"
    if found["notice"]:
        yield f"  note: {_printable(found['notice'], 500)}"
    for brief in found["checkpoints"]:
        if "unreadable" in brief:
            yield f"  {brief['name']}  cannot be read: {_printable(brief['unreadable'])}"
        else:
            yield (
                f"  {brief['name']}  {_time(brief['created'])}  step {brief['step']:,}  "
                f"{brief['samples']:,} samples  {_size(brief['bytes'])}"
            )
    if found["lost"]:
        from dbmpi.monitor.history import LostReplica

        yield f"  lost: {'; '.join(str(LostReplica(**lost)) for lost in found['lost'])}"
    yield ""
    yield from _checkpoint_lines(found["newest"])


def _checkpoint_lines(found: dict[str, Any]) -> Iterator[str]:
    learned = found["frontier"] - len(found["holes"])
    stream = f"{learned:,} of {found['total']:,} batches learned"
    if found["holes"]:
        stream += f"; missing before batch {found['frontier']:,}: {_list(found['holes'])}"
    from_loop = found["total"] == 0  # of a user's own, which has no stream of batches
    facts = {
        "created": _time(found["created"]),
        "step": f"{found['step']:,}",
        "samples": f"{found['samples']:,}",
        **({} if from_loop else {"stream": stream, "per replica": _list(found["done"])}),
        "topology": f"{_count(found['shards'], 'shard')}, {_count(found['replicas'], 'replica')} "
        f"of {_count(found['partitions'], 'partition')}",
        "versions": _list(found["shard_versions"]),
        **({} if from_loop else _samples(found)),
        "parameters": f"{found['parameters']:,}",
        "checksums": "compared with all that was read" if found["verified"] else "none, as in the format's version 1",
        "libraries": ", ".join(f"{name} {text}" for name, text in found["libraries"].items()),
    }
    yield f"{_printable(found['path'])}  ({_size(found['bytes'])})"
    for name, text in facts.items():
        yield f"  {name:<12} {_printable(text, 500)}"
    for name, value in (found["meaning"] or {}).items():
        yield f"  {name.replace('_', ' '):<12} {_printable(value)}"
    yield "  configuration"
    for key, value in _flat(found["configuration"]):
        yield f"    {_printable(key)} = {_printable(value)}"
    yield ""
    yield from _array_lines(found["arrays"])


def _samples(found: dict[str, Any]) -> dict[str, str]:
    targets = f"{found['classes']} classes" if found["classes"] else "values"
    return {"inputs": _shape(found["input_shape"]), "targets": targets}


def _array_lines(arrays: Sequence[dict[str, Any]]) -> Iterator[str]:
    """One line an array, under a heading; numbers in columns."""
    rows = [(_printable(array["name"]), _shape(array["shape"]), array["dtype"], array) for array in arrays]
    if not rows:
        yield "no arrays"
        return
    names, shapes, types = (max(len(str(row[column])) for row in rows) for column in range(3))
    heading = "".join(f"{name:>11}" for name in _COLUMNS)
    yield f"  {'':<{names}}  {'shape':<{max(shapes, 5)}}  {'dtype':<{max(types, 5)}}{heading}  non-finite"
    for name, shape, kind, array in rows:
        start = f"  {name:<{names}}  {shape:<{max(shapes, 5)}}  {kind:<{max(types, 5)}}"
        if "not_read" in array:
            yield f"{start}  {array['not_read']}"
            continue
        numbers = "".join(f"{'-' if array[key] is None else format(array[key], '.4g'):>11}" for key in _COLUMNS)
        yield f"{start}{numbers}  {array['non_finite'] or 'none':>10}"
        for key, value in array.get("attributes", {}).items():
            yield f"    {_printable(key)} = {_printable(value)}"


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings of a description as the dotted keys that ``--set`` takes."""
    below = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) and value else None
    )
    if below is None or key.count(".") > 20:
        yield key, value
        return
    for name, inner in below:
        yield from _flat(inner, f"{key}.{name}" if key else str(name))


def _printable(value: Any, length: int = _TEXT_SHOWN) -> str:
    """Return text without control characters, so that it cannot control the terminal."""
    text = value if isinstance(value, str) else json.dumps(value)
    shown = "".join(letter if letter.isprintable() else "?" for letter in text[:length])
    return shown + ("..." if len(text) > length else "")


def _time(text: str) -> str:
    return _printable(text[:19].replace("T", " ")) + " UTC"


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(f"{length:,}" for length in shape) or "one number"


def _list(numbers: Sequence[int]) -> str:
    shown = ", ".join(f"{number:,}" for number in numbers[:8]) or "none"
    return shown + (f", ... ({len(numbers):,} in all)" if len(numbers) > 8 else "")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 else f"{count / 2**10:,.1f} KiB"
