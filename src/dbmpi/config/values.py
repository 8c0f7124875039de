"""Types of the values in a description, and the base of its sections."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from dbmpi.errors import UserError

MOST = 2**53
"""The largest count: up to here every integer is also a float."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_\-]*$", max_length=64)]
DatasetName = Annotated[str, Field(pattern=r"^[^\x00]*[^/\x00][^\x00]*$", max_length=200)]

# Strict: in a file that has types, true is no 1 and "5" is no 5.
Count = Annotated[int, Field(ge=1, le=MOST, strict=True)]
CountOrNone = Annotated[int, Field(ge=0, le=MOST, strict=True)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError("must be odd, so that the window has a middle")
    return value


Odd = Annotated[int, Field(ge=1, le=MOST, strict=True), AfterValidator(_odd)]


def _possible(path: Path) -> Path:
    if "\0" in str(path):
        raise ValueError("a path has no NUL character")
    return path


PossiblePath = Annotated[Path, AfterValidator(_possible)]


class Section(BaseModel):
    """A part of the description: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **values: Any) -> None:
        """Raise UserError, as :func:`dbmpi.load` does, where the values do not fit."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            from dbmpi.config.messages import explain

            raise UserError(explain(error, type(self), type(self).__name__, values)) from None

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # validation does not go through it


def shown(value: Any) -> str:
    """Return the beginning of a value as text."""
    try:
        return json.dumps(value, default=str)[:80]
    except (ValueError, RecursionError):
        return "a number or nesting too large to show"


def meaning(section: type[BaseModel], key: str) -> str:
    """Return what the source says below a setting; empty where it says nothing.

    Pydantic could read that when a section is defined, but would look at thousands of files in every process.

    Parameters
    ----------
    section, key
        The section, and the name of the setting.
    """
    kinds = (kind for kind in section.__mro__ if key in vars(kind).get("__annotations__", {}))
    return _meanings(next(kinds)).get(key, "") if key in section.model_fields else ""


@cache
def _meanings(kind: type) -> dict[str, str]:
    found: dict[str, str] = {}
    try:
        [body] = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    except OSError:  # installed without sources
        return found
    assert isinstance(body, ast.ClassDef)
    for line, below in pairwise(body.body):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(below, ast.Expr):
            text = getattr(below.value, "value", None)
            found |= {line.target.id: inspect.cleandoc(text)} if isinstance(text, str) else {}
    return found
