"""What is wrong with a description, said so that it can be mended."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from dbmpi.config.layers import LAYERS, OwnLayer
from dbmpi.config.values import shown

_NUMBER, _PAIR = "constrained-int", "tuple[constrained-int"
"""What pydantic puts behind the place of a key that takes a number or two, once for each."""
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
    """Turn a validation error into lines that name the place, what was given and what was expected.

    `origin` is where the description comes from, or a function that tells it of a place.  Layers are counted from 0; if
    the `table` that does not fit is given, lines say what they are called, too.
    """
    lines = []
    for problem in error.errors():
        place = _without_tags(problem["loc"])
        if any(str(part).startswith(_PAIR) for part in place):
            continue
        where = ".".join(str(part) for part in place if part != _NUMBER)
        source = origin if isinstance(origin, str) else origin([part for part in place if part != _NUMBER])
        called = _called(table, place)
        if _NUMBER in place:
            expected = "expected a whole number of at least 1, or two of them, [rows, columns]"
            lines.append(f"{source}: {where}{called}: {expected} (given: {shown(problem['input'])})")
        elif problem["type"] == "extra_forbidden":
            known = _keys(model, problem["loc"][:-1])
            near = difflib.get_close_matches(str(place[-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            lines.append(f"{source}: unknown key {where!r}{called}; {hint}")
        elif problem["type"] == "union_tag_invalid":
            known = [str(kind.model_fields["type"].default) for kind in LAYERS]
            given = str(problem.get("ctx", {}).get("tag"))
            near = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
            others = f"known are {', '.join(known)}, and module:Class for a layer of your own"
            hint = f"did you mean {near[0]!r}?" if near else others
            lines.append(f"{source}: {where}.type{called}: {given[:40]!r} is no type of layer; {hint}")
        elif problem["type"] == "missing":
            lines.append(f"{source}: {where!r}{called} is missing: {_meaning(model, problem['loc'])}")
        elif problem["type"] in _EXPECTED:
            lines.append(f"{source}: {where}{called}: {_EXPECTED[problem['type']]} (given: {shown(problem['input'])})")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            given = "" if problem["type"] == "value_error" else f" (given: {shown(problem['input'])})"
            lines.append(": ".join(part for part in (source, where + called, message) if part) + given)
    return "\n".join(lines)


def _without_tags(place: tuple[int | str, ...]) -> list[int | str]:
    """Return a place without the types of layers that pydantic puts behind their numbers."""
    return [part for before, part in zip((None, *place), place, strict=False) if not isinstance(before, int)]


def _called(table: Any, place: list[int | str]) -> str:
    """Return the name of the layer that a place is in, given or by default."""
    try:
        if place[:2] != ["network", "layers"] or len(place) < 4:
            return ""
        number = int(place[2])
        layer = table["network"]["layers"][number]
        kind = layer.get("type", "dense").rpartition(":")[2].lower()
        return f" (layer {str(layer.get('name') or f'{kind}{number + 1}')!r})"
    except (TypeError, LookupError, AttributeError, ValueError):  # a table of another form, which is what is told
        return ""


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Return the models that an annotation contains, e.g. the layers of ``tuple[Dense, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, tuple, list, dict, Annotated):
        return [model for part in get_args(annotation) for model in _models(part)]
    return []


def _descend(model: type[BaseModel], place: tuple[int | str, ...]) -> list[type[BaseModel]]:
    """Return the models that may stand at a place, with types of layers behind their numbers, in the description."""
    models = [model]
    for before, part in zip((None, *place), place, strict=False):
        if isinstance(before, int):
            kinds = [found for found in models if found.model_fields["type"].default == part]
            models = kinds or [found for found in models if found is OwnLayer]
            continue
        fields = [m.model_fields[str(part)] for m in models if str(part) in m.model_fields]
        if fields:
            models = [found for field in fields for found in _models(field.annotation)]
    return models


def _keys(model: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    return [name for found in _descend(model, place) for name in found.model_fields]


def _meaning(model: type[BaseModel], place: tuple[int | str, ...]) -> str:
    """Return the documentation of a field, for the message that asks for it."""
    for found in _descend(model, place[:-1]):
        field = found.model_fields.get(str(place[-1]))
        if field is not None:
            return field.description or (f"a [{place[-1]}] table" if _models(field.annotation) else "a value")
    return "a value"
