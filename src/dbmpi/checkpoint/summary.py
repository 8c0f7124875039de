"""What is in a checkpoint, a run directory or a data file, as a dictionary that is printed or becomes JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import h5py
import numpy as np

from dbmpi.checkpoint import array_blocks, comparison, directory, statistics
from dbmpi.checkpoint.array_blocks import StoredNumbers
from dbmpi.checkpoint.finite import finite_or_none
from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.checkpoint.schema import FORMAT, SHARD_FORMAT
from dbmpi.checkpoint.statistics import Statistics
from dbmpi.checkpoint.untrusted import HDF5_ERRORS
from dbmpi.config.defaults import chosen, settings
from dbmpi.errors import Damaged, UserError
from dbmpi.monitor.history import RunHistory
from dbmpi.monitor.records import read_records

_PROGRESS = ("step", "samples", "created", "seconds", "loss", "accuracy", "test_step", "test_loss", "test_accuracy")

_END = ("session", "step", "epoch", "reason")


def describe(
    path: Path, opened: Checkpoint | None = None, known: Mapping[str, Statistics] = MappingProxyType({})
) -> dict[str, Any]:
    """Return the contents of a path: ``kind`` is ``"run"``, ``"checkpoint"`` or ``"data"``.

    Parameters
    ----------
    path
        A file, or the directory of a run.
    opened
        The checkpoint there, if it is open already; it stays open.
    known
        Statistics of some of its arrays by name, which are not read again.

    Raises
    ------
    UserError
        If it is neither, or cannot be read.
    """
    if path.is_dir():
        with nullcontext(opened) if opened is not None else Checkpoint.open(path) as checkpoint:
            found = {"kind": "run", "path": str(path), "notice": checkpoint.notice, **_run(path)}
            return {**found, "newest": _checkpoint(checkpoint, known)}
    if opened is not None:
        return _checkpoint(opened, known)
    if not path.exists():
        raise UserError(f"{path}: no such file or directory; expected a checkpoint, a run directory or a data file")
    if path.name in directory.POINTERS or _is_checkpoint(path):
        with Checkpoint.open(path) as checkpoint:
            return _checkpoint(checkpoint, known)
    return _data(path)


def compared(one: Checkpoint, other: Checkpoint, *, everything: bool = False) -> dict[str, Any]:
    """Return how two checkpoints differ.

    Parameters
    ----------
    one, other
        How it was, and how it is now.
    everything
        Whether to compare the state of the update rule, too.
    """
    arrays = [
        array_blocks.everything(each)
        if everything
        else [*array_blocks.parameters(each), *array_blocks.objective_state(each)]
        for each in (one, other)
    ]
    then, now = (dict(settings(_configuration(each))) for each in (one, other))
    return {
        "kind": "comparison",
        "then": _brief(one),
        "now": _brief(other),
        "notices": [each.notice for each in (one, other) if each.notice],
        "settings": [
            {"key": key, "then": then.get(key), "now": now.get(key)}
            for key in _together([*then, *now])
            if then.get(key) != now.get(key)
        ],
        **comparison.compare(*arrays),
    }


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint, or the newest one of a run at `path`, as :meth:`Checkpoint.open` does; UserError for data."""
    if path.is_file() and path.name not in directory.POINTERS and not _is_checkpoint(path):
        raise UserError(f"{path}: is a data file, expected a checkpoint or a run directory")
    return Checkpoint.open(path)


def _together(keys: Sequence[str]) -> list[str]:
    """Return the dotted keys, each once: those of one section together, and in it those of one layer."""
    first: dict[str, int] = {}
    for place, key in enumerate(keys):
        first.setdefault(key.partition(".")[0], place)
        first.setdefault(key.rpartition(".")[0], place)
    return sorted(dict.fromkeys(keys), key=lambda key: (first[key.partition(".")[0]], first[key.rpartition(".")[0]]))


def _run(path: Path) -> dict[str, Any]:
    """Return what a run directory holds beside the newest checkpoint."""
    folder = directory.checkpoints_directory(path)
    recorded = any((path / "records").glob("*.jsonl"))
    history = RunHistory(read_records(path)) if recorded else None
    return {
        "checkpoints": [_candidate(candidate) for candidate in sorted(directory.checkpoints(folder))],
        "latest": _pointed(folder, directory.LATEST),
        "best": _pointed(folder, directory.BEST),
        "lost": [] if history is None else [asdict(lost) for lost in history.lost],
        "ends": [] if history is None else [{key: one[key] for key in _END} for one in history.early_ends],
        "withheld": 0 if history is None else history.withheld,
        "discarded": 0 if history is None else history.discarded,
    }


def _pointed(folder: Path, name: str) -> str | None:
    """Return which checkpoint ``latest`` or ``best`` in a directory names."""
    found = directory.read_pointer(folder, name)
    return None if found is None else found.name


def _is_checkpoint(path: Path) -> bool:
    """Return whether an HDF5 file says of itself that it is (of) a checkpoint; UserError if it is no HDF5 file."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            return bool(_attributes(file).get("attributes", {}).get("format") in (FORMAT, SHARD_FORMAT))
    except HDF5_ERRORS as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not an HDF5 file, or a torn one, expected a checkpoint or data: {reason}") from None


def _candidate(path: Path) -> dict[str, Any]:
    try:
        with Checkpoint.open(path) as checkpoint:
            return _brief(checkpoint)
    except (UserError, FileNotFoundError) as error:
        return {"name": path.name, "path": str(path), "unreadable": str(error)}


def _brief(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return how far a checkpoint was."""
    facts = {name: getattr(checkpoint.info, name) for name in _PROGRESS}
    numbers = {name: finite_or_none(value) for name, value in facts.items()}
    return {
        "name": checkpoint.path.name,
        "path": str(checkpoint.path),
        "bytes": checkpoint.nbytes,
        "parameters": checkpoint.layout.size,
        **numbers,
    }


def _configuration(checkpoint: Checkpoint) -> Any:
    """Return the configuration in a checkpoint; where it is no JSON, it stays the text that it is."""
    text = checkpoint.info.configuration
    try:
        return json.loads(text, parse_constant=str)
    except (ValueError, RecursionError):
        return text


def _checkpoint(checkpoint: Checkpoint, known: Mapping[str, Statistics]) -> dict[str, Any]:
    info = {name: finite_or_none(value) for name, value in asdict(checkpoint.info).items()}
    if checkpoint.info.meaning is not None:
        info["meaning"] = checkpoint.info.meaning.model_dump(exclude_defaults=True)
    keys = chosen(checkpoint.info.configuration)
    return {
        "kind": "checkpoint",
        "path": str(checkpoint.path),
        "bytes": checkpoint.nbytes,
        "parameters": checkpoint.layout.size,
        "verified": checkpoint.has_checksums,
        **info,
        "configuration": _configuration(checkpoint),
        "chosen": None if keys is None else sorted(keys),
        "arrays": list(_arrays(array_blocks.everything(checkpoint), known)),
    }


def _arrays(arrays: Iterable[StoredNumbers], known: Mapping[str, Statistics]) -> Iterable[dict[str, Any]]:
    for array in arrays:
        try:
            numbers = statistics.as_dict(known.get(array.name) or statistics.of_array(array))
        except Damaged as error:
            numbers = {"not_read": "damaged", "damaged": str(error)}
        yield {"name": array.name, "shape": array.shape, "dtype": str(array.dtype), **numbers}


def _data(path: Path) -> dict[str, Any]:
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
