"""Write docs/configuration.md from the descriptions in dbmpi.config: one table a section.

Run it after a change there; a test compares the file with what this program would write.
"""

from __future__ import annotations

import inspect
import types
from pathlib import Path
from typing import Annotated, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dbmpi import config

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
        model = field.annotation
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)
        parts.append(_section(f"[{name}]", model))
        if name == "network":
            for layer in config.LAYERS:
                parts.append(_section(f'[[network.layers]] with type = "{layer.model_fields["type"].default}"', layer))
            parts.append(_section('[[network.layers]] with type = "module:Class"', config.OwnLayer))
        if name == "placement":
            parts.append(_section("[placement.layers.NAME]", config.PlacedLayer))
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
        meaning = " ".join((field.description or "").replace("``", "`").replace("|", "\\|").split())
        lines.append(f"| `{key}` | {_values(field)} | {_default(field)} | {meaning} |")
    return "\n".join([*lines, ""])


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "*required*"
    value = field.default
    if value is None or value == {}:
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _values(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(entry, name)}"
        for entry in field.metadata
        for name, sign in (("ge", ">="), ("gt", ">"), ("lt", "<"))
        if getattr(entry, name, None) is not None
    ]
    return " ".join([_type(field.annotation), *bounds])


def _type(annotation: object) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _type(get_args(annotation)[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if origin in (Union, types.UnionType):
        return " or ".join(_type(part) for part in get_args(annotation) if part is not type(None))
    if origin is tuple:
        return _sequence(get_args(annotation))
    names = {int: "integer", float: "number", str: "text", bool: "`true`, `false`", Path: "path", dict: "tables"}
    return names.get(origin or annotation, "value")  # type: ignore[arg-type]


def _sequence(parts: tuple[object, ...]) -> str:
    """Describe a tuple: a few values, a list of values, or tables."""
    if Ellipsis not in parts:
        return f"[{', '.join(map(_type, parts))}]"
    one = _type(parts[0])
    return f"list of {one}s" if one in ("integer", "number", "text") else "tables"


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
