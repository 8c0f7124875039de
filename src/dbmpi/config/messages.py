"""Error messages about a description: what was given, what was expected, and how to fix it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from dbmpi.config.layers import LAYERS, OwnLayer
from dbmpi.config.values import meaning, shown
from dbmpi.errors import suggestion

_NUMBER, _PAIR = "constrained-int", "tuple[constrained-int"
"""What pydantic puts behind the path of a key that takes a number or two, once for each."""
_EXPECTED = {
    "union_tag_not_found": "expected a [[network.layers]] table",
    "tuple_type": "expected a list, [...]",
    "dict_type": "expected a table",
    "model_type": "expected a table",
}
"""For types of problems what was expected, in the words of TOML."""


def explain(
    error: ValidationError,
    model: type[BaseModel],
    origin: str | Callable[[Sequence[int | str]], str],
    table: Any = None,
) -> str:
    """Turn a validation error into lines that name the path of a value, what was given and what was expected.

    Parameters
    ----------
    error
        What pydantic has raised.
    model
        The section, or the run, that was to be made.
    origin
        Where the description comes from, or a function that returns that for a path.
    table
        The description that does not fit, for the names of layers.  In paths they are counted from 0.
    """
    lines = []
    for problem in error.errors():
        path = _without_tags(problem["loc"])
        # A default that depends on a setting that is wrong is no mistake of its own.
        if any(str(part).startswith(_PAIR) for part in path) or problem["type"] == "default_factory_not_called":
            continue
        shown_path = [part for part in path if part != _NUMBER]
        source = origin if isinstance(origin, str) else origin(shown_path)
        where, called = ".".join(map(str, shown_path)), _called(table, path)
        given = f" (given: {shown(problem['input'])})"
        match problem["type"]:
            case _ if _NUMBER in path:
                expected = "expected a whole number of at least 1, or two of them, [rows, columns]"
                lines.append(f"{source}: {where}{called}: {expected}{given}")
            case "extra_forbidden":
                hint = suggestion(str(path[-1]), _keys(model, problem["loc"][:-1]))
                lines.append(f"{source}: unknown key {where!r}{called}; {hint}")
            case "union_tag_invalid":
                known = [str(kind.model_fields["type"].default) for kind in LAYERS]
                tag = str(problem.get("ctx", {}).get("tag"))
                others = f"known are {', '.join(known)}, and module:Class for a layer of your own"
                hint = suggestion(tag, known, others)
                lines.append(f"{source}: {where}.type{called}: {tag[:40]!r} is no type of layer; {hint}")
            case "missing":
                lines.append(f"{source}: {where!r}{called} is missing: {_meaning(model, problem['loc'])}")
            case kind if kind in _EXPECTED:
                lines.append(f"{source}: {where}{called}: {_EXPECTED[kind]}{given}")
            case kind:
                message = problem["msg"].removeprefix("Value error, ")
                text = ": ".join(part for part in (source, where + called, message) if part)
                lines.append(text + ("" if kind == "value_error" else given))
    return "\n".join(lines)


def _without_tags(path: tuple[int | str, ...]) -> list[int | str]:
    """Return a path without the types of layers that pydantic puts behind their numbers."""
    return [part for before, part in zip((None, *path), path, strict=False) if not isinstance(before, int)]


def _called(table: Any, path: list[int | str]) -> str:
    """Return the name of the layer that a path leads into, given or by default."""
    try:
        if path[:2] != ["network", "layers"] or len(path) < 4:
            return ""
        number = int(path[2])
        layer = table["network"]["layers"][number]
        kind = layer.get("type", "dense").rpartition(":")[2].lower()
        return f" (layer {str(layer.get('name') or f'{kind}{number + 1}')!r})"
    except (TypeError, LookupError, AttributeError, ValueError):  # a table of another form, which is the problem
        return ""


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Return the models that an annotation contains, e.g. the layers of ``tuple[Dense, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, tuple, list, dict, Annotated):
        return [model for part in get_args(annotation) for model in _models(part)]
    return []


def _descend(model: type[BaseModel], path: tuple[int | str, ...]) -> list[type[BaseModel]]:
    """Return the models that may stand at a path, with types of layers behind their numbers, in the description."""
    models = [model]
    for before, part in zip((None, *path), path, strict=False):
        if isinstance(before, int):
            kinds = [found for found in models if found.model_fields["type"].default == part]
            models = kinds or [found for found in models if found is OwnLayer]
            continue
        fields = [m.model_fields[str(part)] for m in models if str(part) in m.model_fields]
        if fields:
            models = [found for field in fields for found in _models(field.annotation)]
    return models


def _keys(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    return [name for found in _descend(model, path) for name in found.model_fields]


def _meaning(model: type[BaseModel], path: tuple[int | str, ...]) -> str:
    """Return the documentation of a field, for the message that asks for it."""
    for found in _descend(model, path[:-1]):
        field = found.model_fields.get(str(path[-1]))
        if field is not None:
            return meaning(found, str(path[-1])) or (
                f"a [{path[-1]}] table" if _models(field.annotation) else "a value"
            )
    return "a value"
