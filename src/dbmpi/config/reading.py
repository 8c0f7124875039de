"""From a TOML file, and settings that override it, to a run."""

from __future__ import annotations

import copy
import os
import tomllib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dbmpi.config.layers import OwnLayer
from dbmpi.config.messages import explain
from dbmpi.config.sections import Run
from dbmpi.errors import UserError

_SHOWN = 80
"""Letters of an override in a message."""


def load(path: Path | str, overrides: Sequence[str] = ()) -> Run:
    """Read the description of a run from a TOML file.

    A description without a model is for ``dbmpi.train(run, objective=...)``.  Relative paths in ``[data]``,
    ``network.code`` and ``run.initial`` are resolved against the directory of the file, so that a configuration, its
    data and its layers can be moved together.  ``run.directory`` stays relative to the current directory.

    Parameters
    ----------
    path : pathlib.Path or str
        The TOML file.
    overrides : sequence of str, optional
        Settings that replace those of the file, each as ``"section.key=value"`` with a TOML value.

    Returns
    -------
    Run
        The validated description, with all defaults filled in.

    Raises
    ------
    UserError
        If the file cannot be read, is not TOML, or does not describe a run.

    Examples
    --------
    >>> import dbmpi
    >>> run = dbmpi.load("examples/digits.toml", ["optimizer.epochs=5"])
    >>> run.optimizer.epochs
    5.0
    """
    return read(path, overrides, complete=False)


def read(path: Path | str, overrides: Sequence[str] = (), *, complete: bool = True) -> Run:
    """Read the description of a run as :func:`load` does, for a command.

    Parameters
    ----------
    path, overrides
        As for :func:`load`.
    complete
        Whether it must describe a network or an objective.
    """
    path = Path(path)
    table = _read(path)
    for name, key in (("data", "train"), ("data", "test"), ("network", "code"), ("run", "initial")):
        section = table.get(name)
        if isinstance(section, dict) and key in section:
            section[key] = _beside(path, section[key])
    written = copy.deepcopy(table)
    for override in overrides:
        _apply(table, override)
    origin, problems = partial(_origin, path, written, overrides), []
    if complete and _lacks_model(table):
        problems.append(
            f"{origin(('network', 'layers'))}: 'network.layers' is missing: the layers, each a [[network.layers]] "
            "table; or an [objective] of your own instead of a network"
        )
    try:
        run = Run.model_validate(table)
    except ValidationError as error:
        problems.insert(0, explain(error, Run, origin, table))
    if problems:
        raise UserError("\n".join(problems))
    own_layers = any(isinstance(layer, OwnLayer) for layer in run.network.layers)
    names_code = (
        run.sandblaster.own or run.optimizer.own or run.objective is not None or own_layers or run.data.transform
    )
    if run.network.code is None and names_code:
        here = run.network.model_copy(update={"code": path.parent})
        return run.model_copy(update={"network": here})
    return run


def _beside(configuration: Path, place: Any) -> Any:
    """Return a path, or those of a list or table, as seen from the directory of the configuration."""
    if isinstance(place, str):
        return os.path.normpath(configuration.parent / place)
    if isinstance(place, list):
        return [_beside(configuration, each) for each in place]
    if isinstance(place, dict):
        return {key: _beside(configuration, each) for key, each in place.items()}
    return place


def _lacks_model(table: dict[str, Any]) -> bool:
    """Return whether a table describes neither a network nor an objective."""
    network = table.get("network", {})
    return "objective" not in table and isinstance(network, dict) and network.get("layers", []) == []


def _read(path: Path) -> dict[str, Any]:
    """Read a file of TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except IsADirectoryError:
        raise UserError(
            f"{path}: is a directory, expected a configuration, CONFIG.toml; a run is resumed with its own "
            "configuration and --set checkpoint.resume=auto"
        ) from None
    except UnicodeDecodeError:
        raise UserError(
            f"{path}: cannot be read as a configuration, which is a text; data are named in it, [data] train = ..."
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a configuration: {error}") from None
    except RecursionError:
        raise UserError(f"{path}: not valid TOML that can be read: its values are nested too deeply") from None
    except ValueError as error:  # TOMLDecodeError, or a number of too many digits
        raise UserError(f"{path}: not valid TOML: {error}") from None


def is_configuration(path: Path) -> bool:
    """Return whether a file is one that :func:`load` is for, well written or not.

    Parameters
    ----------
    path
        The file, which need not exist.
    """
    if path.suffix == ".toml":
        return path.is_file()
    try:
        with path.open("rb") as file:
            head = file.read(1 << 16)
        return not {"data", "network", "optimizer"}.isdisjoint(tomllib.loads(head.decode("utf-8")))
    except (OSError, ValueError, RecursionError):
        return False


def _origin(path: Path, written: Mapping[str, Any], overrides: Sequence[str], keys: Sequence[int | str]) -> str:
    """Return the file or the override that sets the value under `keys`, in the user's words."""
    parts = [str(key) for key in keys]
    for override in reversed(overrides):
        target = override.partition("=")[0].strip().split(".")
        if parts[: len(target)] == target or (
            target[: len(parts)] == parts and parts and not _contains(written, parts)
        ):
            return _shortened(override)
    return f"{path} with {' '.join(map(_shortened, overrides))}" if overrides and len(parts) < 2 else str(path)


def _shortened(override: str) -> str:
    return f"--set {override}" if len(override) <= _SHOWN else f"--set {override[:_SHOWN]}..."


def _contains(table: Any, parts: Sequence[str]) -> bool:
    """Return whether a table has a value under these keys."""
    for part in parts:
        if isinstance(table, list) and part.isdecimal() and int(part) < len(table):
            table = table[int(part)]
        elif isinstance(table, dict) and part in table:
            table = table[part]
        else:
            return False
    return True


def _sections_with(key: str) -> list[str]:
    """Return a key with each section that has it, for an override without a section."""
    found = []
    for name, field in Run.model_fields.items():
        fields = getattr(field.annotation, "model_fields", {})
        if key in fields:
            found.append(f"{name}.{key}")
    return found


def _apply(table: dict[str, Any], override: str) -> None:
    """Set one ``section.key=value`` in the table; the value is TOML, or else a plain string."""
    target, equals, text = override.partition("=")
    keys = target.strip().split(".")
    if not equals or len(keys) < 2 or not all(keys):
        meant = [f"--set {name}={text or '...'}" for name in _sections_with(keys[-1])]
        hint = f"did you mean {' or '.join(meant)}?" if meant else "e.g. --set optimizer.epochs=5"
        raise UserError(f"--set {override}: expected section.key=value; {hint}")
    if not text.strip():
        raise UserError(f"--set {override}: expected a value behind '='; an empty text is {target.strip()}='\"\"'")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text.strip()
    entry: Any = table
    for key in keys[:-1]:
        entry = _step(entry, key, override)
    if isinstance(entry, list):
        raise UserError(f"--set {override}: name a key of layer {keys[-1]}, e.g. network.layers.{keys[-1]}.units=100")
    entry[keys[-1]] = value


def _step(entry: Any, key: str, override: str) -> Any:
    """Go one level down; in a list of tables by number, counted from 0."""
    if isinstance(entry, list):
        if key not in map(str, range(len(entry))):
            raise UserError(f"--set {override}: {key!r} is not one of the {len(entry)} entries 0 to {len(entry) - 1}")
        below = entry[int(key)]
    else:
        below = entry.setdefault(key, {})
    if not isinstance(below, dict | list):
        raise UserError(f"--set {override}: {key!r} is a value and has no keys")
    return below
