"""Write docs/configuration.md from the descriptions in dbmpi.config: one table a section.

Run it after a change there; a test compares the file with what this program would write.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dbmpi import config
from dbmpi.config.values import MOST, meaning

TARGET = Path(__file__).parent.parent / "docs" / "configuration.md"
HEAD = """# Configuration

A run is described by a TOML file. Every setting, its default and its meaning stand below; an unknown key is an error
that names the nearest known one. `--set section.key=value` overrides a setting for one start, layers are counted from
0: `--set network.layers.0.units=100`. The effective description, defaults included, is stored in every checkpoint;
`dbmpi inspect` shows it.

Paths in `[data]` and `network.code` are relative to the file, the run directory is relative to the current directory.

*This page is written by `tools/write_configuration_docs.py` from `dbmpi.config`.*
"""


def text() -> str:
    """Return the whole page."""
    parts = [HEAD]
    for name, field in config.Run.model_fields.items():
        model = next(part for part in (*get_args(field.annotation), field.annotation) if part is not type(None))
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)
        parts.append(_section(f"[{name}]", model))
        if name == "network":
            for layer in config.LAYERS:
                parts.append(_section(f'[[network.layers]] with type = "{layer.model_fields["type"].default}"', layer))
            parts.append(_section('[[network.layers]] with type = "module:Class"', config.OwnLayer))
        if name == "placement":
            parts.append(_section("[placement.layers.NAME]", config.PlacedLayer))
        if name == "simulation":
            parts.append(_section("[simulation.NAME]", config.TimesSection))
    return "\n".join(parts)


def _section(title: str, model: type[BaseModel]) -> str:
    lines = [
        f"## `{title}`",
        "",
        inspect.cleandoc(model.__doc__ or "").replace("``", "`"),
        "",
        "| key | values | default | meaning |",
        "|---|---|---|---|",
    ]
    for key, field in model.model_fields.items():
        text = " ".join(meaning(model, key).replace("``", "`").replace("|", "\\|").split())
        lines.append(f"| `{key}` | {_values(field.annotation, field.metadata)} | {_default(field)} | {text} |")
    return "\n".join([*lines, ""])


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "*required*"
    value = field.default
    if value is None or value in ({}, ()) or field.default_factory is not None:  # the meaning says it
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _values(annotation: object, metadata: Iterable[object]) -> str:
    """Describe what a setting, or an entry of one, may be: its type and its bounds."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [entry for field in parts[1:] for entry in getattr(field, "metadata", [field])]
        return _values(parts[0], [*inner, *metadata])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in parts)
    if origin in (Union, types.UnionType):
        choices = [_values(part, metadata) for part in parts if part is not type(None)]
        return (", or " if "," in choices[0] else " or ").join(choices)
    if origin is tuple:
        return _sequence(parts)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "table"
    names = {int: "integer", float: "number", str: "text", bool: "`true`, `false`", Path: "path", dict: "tables"}
    name = names.get(origin or annotation, "value")  # type: ignore[arg-type]
    bounds = _bounds(metadata)
    return f"{name}, {bounds}" if bounds and name in ("integer", "number") else name


def _bounds(metadata: Iterable[object]) -> str:
    """Return bounds in words; those that only keep numbers in the range of their type are left out."""
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    found = [(word, getattr(entry, name, None)) for name, word in words.items() for entry in metadata]
    return " and ".join(f"{word} {value:g}" for word, value in found if value is not None and value < MOST)


def _sequence(parts: tuple[object, ...]) -> str:
    """Describe a tuple: a list of a given or any length, or tables."""
    one, _, bounds = _values(parts[0], ()).partition(", ")
    if one not in ("integer", "number", "text"):
        return "tables"
    length = "" if Ellipsis in parts else f"{len(parts)} "
    return f"list of {length}{one}s" + (f", each {bounds}" if bounds else "")


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
