"""Write what a checkpoint has learned for another program: ``dbmpi.export``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

import dbmpi
from dbmpi.checkpoint import directory
from dbmpi.checkpoint.named_arrays import names_outside
from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.checkpoint.schema import PARAMETERS
from dbmpi.checkpoint.writer import CheckpointWriter
from dbmpi.data.encoding import Encoding
from dbmpi.errors import UserError
from dbmpi.formats.arrays import ExportedArray, write_npz, write_safetensors
from dbmpi.formats.torch_names import torch_names
from dbmpi.index.layout import Tensor
from dbmpi.network.description import Network
from dbmpi.result import Result
from dbmpi.runs import trained_network
from dbmpi.runs.trained_network import TrainedNetwork

SUFFIXES = (".npz", ".safetensors", ".h5", ".onnx")
_AT_ONCE = 1 << 20
"""Elements of a vector that are copied at once."""


def export(
    checkpoint: str | Path | Result,
    path: str | Path,
    *,
    names: Literal["dbmpi", "torch"] = "dbmpi",
    code: Sequence[str | Path] = (),
    force: bool = False,
) -> Path:
    """Write the parameters, or the whole network, of a checkpoint to a file for other programs.

    With the parameters goes the state of an objective, such as buffers and frozen parameters of a module of PyTorch.

    Parameters
    ----------
    checkpoint : path or Result
        A checkpoint, the directory of a run (its newest checkpoint), or what ``dbmpi.train`` returned.
    path : path
        The file.  Its suffix says what it is: ``.npz`` for ``numpy.load``; ``.safetensors``; ``.h5``, the whole
        checkpoint in one plain file; or ``.onnx``, the network itself, which needs the extra ``dbmpi[onnx]``.
    names : "dbmpi" or "torch"
        Names of the arrays in ``.npz`` and ``.safetensors``: those of the checkpoint, e.g. ``dense1/weights``, or those
        of a ``state_dict`` of PyTorch, e.g. ``dense1.weight``, for networks of dense layers and convolutions.
    code : sequence of paths
        Files from which classes of a user's own layers may be loaded; needed for ``.onnx`` and ``names="torch"`` alone.
    force : bool
        Overwrite `path` if it exists.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    UserError
        If there is no whole checkpoint, the file exists, or the network cannot be expressed.
    DiskFailed
        If the file cannot be written; none is left behind then.

    Examples
    --------
    >>> import dbmpi, numpy
    >>> overrides = ["optimizer.epochs=2", "monitor.progress=none", "run.directory=runs/exported"]
    >>> result = dbmpi.train(dbmpi.load("examples/digits.toml", overrides))
    >>> file = dbmpi.export(result, "runs/exported/digits.npz", force=True)
    >>> numpy.load(file)["dense1/bias"].dtype
    dtype('float32')
    """
    path = Path(path)
    _check(path, names, force=force)
    origin = Path(checkpoint.checkpoint if isinstance(checkpoint, Result) else checkpoint)
    if path.suffix == ".onnx" or names == "torch":
        trained = trained_network.load(origin, [Path(file) for file in code])
        with trained.checkpoint as opened:
            _tell(opened)
            if not isinstance(trained.network, Network):
                raise UserError(
                    f"{trained.path}: {trained.network.called} is no network of dbmpi's layers; export its arrays "
                    "under their own names as .npz or .safetensors"
                )
            if path.suffix == ".onnx":
                _write_onnx(path, trained, trained.network)
            else:
                _write_arrays(path, opened, torch_names(trained.network))
    else:
        with Checkpoint.open(origin) as opened:
            _tell(opened)
            if path.suffix == ".h5":
                _write_checkpoint(path, opened)
            else:
                _write_arrays(path, opened, {tensor.name: tensor for tensor in opened.layout.tensors})
    return path


def _check(path: Path, names: str, *, force: bool) -> None:
    """Refuse what cannot be written, or is not to be overwritten."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: expected a name that ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if names not in ("dbmpi", "torch"):
        raise UserError(f"export: names = {names!r}: expected 'dbmpi' or 'torch'")
    if path.suffix == ".h5" and names != "dbmpi":
        raise UserError(f"export: names = {names!r}: a checkpoint has its own names; use .npz or .safetensors")
    if path.suffix == ".h5" and directory.read_pointer(path.parent) is not None:
        raise UserError(f"{path}: beside the checkpoints of a run, where only that writes; give another directory")
    beside = [path.with_name(f"{path.name}.data")] if path.suffix == ".onnx" else []  # where ONNX puts large parameters
    for file in (path, *beside):
        if file.exists() and not force:
            raise UserError(
                f"{file}: exists and is not overwritten; give another name, or --force (in Python force=True)"
            )


def _tell(checkpoint: Checkpoint) -> None:
    """Say which newer checkpoints cannot be read."""
    if checkpoint.notice:
        sys.stderr.write(f"dbmpi: {checkpoint.notice}\n")


def _write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write everything that a checkpoint has into one plain file."""
    layout, dtype = checkpoint.layout, checkpoint.dtype
    buffer = np.empty(min(_AT_ONCE, layout.size), dtype)
    state = checkpoint.objective_state()
    with CheckpointWriter(path, layout, checkpoint.vectors, dtype, state, of_run=False) as writer:
        for vector in checkpoint.vectors:
            for start in range(0, layout.size, _AT_ONCE):
                values = buffer[: layout.size - start]
                checkpoint.read(vector, start, values)
                writer.write(vector, start, values)
        writer.commit(checkpoint.info)


def _write_arrays(path: Path, checkpoint: Checkpoint, names: dict[str, Tensor]) -> None:
    """Write arrays as they are in the checkpoint, and the state of an objective, if there is any."""
    arrays = {
        name: ExportedArray(checkpoint.dtype, tensor.shape, partial(_read, checkpoint, tensor.name))
        for name, tensor in names.items()
    }
    for name, outside in names_outside(checkpoint.layout, checkpoint.state_arrays).items():
        array = checkpoint.state_arrays[name]
        arrays[outside] = ExportedArray(array.dtype, array.shape, partial(_read_state, checkpoint, name))
    if path.suffix == ".npz":
        write_npz(path, arrays)
    else:
        write_safetensors(path, arrays, _facts(checkpoint))


def _write_onnx(path: Path, trained: TrainedNetwork, network: Network) -> None:
    """Write the network as a graph."""
    try:
        from dbmpi.formats import onnx_graph
    except ImportError:
        raise UserError("export to ONNX needs the package onnx: pip install 'dbmpi[onnx]'") from None
    meaning = trained.info.meaning
    encoding = Encoding.learned(meaning)
    stored_bytes = meaning is not None and meaning.elements == "bytes" and not encoding.one_hot
    scale = 1.0 if meaning is None else meaning.scale
    facts = _facts(trained.checkpoint)
    scaled = f"bytes, which the graph multiplies by {scale:.9g}"
    as_measured = "as they were measured; the graph normalises them"
    facts["inputs"] = scaled if stored_bytes else as_measured if encoding.subtract else "as the network sees them"
    facts["outputs"] = "outputs of the last layer" if network.loss is None else network.loss.predicts[1]
    if meaning is not None and meaning.labels:
        facts["labels"] = json.dumps(meaning.labels)
    read = partial(_read, trained.checkpoint)
    moves = encoding.moves(network.input_shape) if encoding.subtract else ()
    onnx_graph.write(path, onnx_graph.graph(network, read, stored_bytes=stored_bytes, scale=scale, moves=moves), facts)


def _read(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """Return one parameter, in its shape."""
    tensor = next(one for one in checkpoint.layout.tensors if one.name == name)
    out = np.empty(tensor.size, checkpoint.dtype)
    checkpoint.read(PARAMETERS, checkpoint.layout.offsets[name], out)
    return out.reshape(tensor.shape)


def _read_state(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """Return one array of an objective's state, in its shape."""
    array = checkpoint.state_arrays[name]
    return checkpoint.read_state(name, 0, array.size).reshape(array.shape)


def _facts(checkpoint: Checkpoint) -> dict[str, str]:
    """Return where the parameters come from."""
    return {"producer": f"dbmpi {dbmpi.__version__}", "step": str(checkpoint.info.step), "format": "pt"}
