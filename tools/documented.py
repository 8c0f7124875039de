"""Find public names that lack documentation: each name of ``dbmpi.__all__`` must be on docs/api.md, and described.

A function describes each argument, what it returns and what it raises, in numpydoc sections, and shows an example.  A
class describes each field, in a docstring below it or in the section of its parameters.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import dbmpi

DATA = ("__version__",)
"""Public names that are neither functions nor classes."""


def problems(page: str) -> list[str]:
    """Return a line for each thing that is not documented; `page` is the text of docs/api.md."""
    found = []
    for name in dbmpi.__all__:
        value = getattr(dbmpi, name)
        written = f"`dbmpi.{name}`" if name in DATA else rf"^::: dbmpi\.{name}$"
        if not re.search(written, page, re.MULTILINE):
            found.append(f"dbmpi.{name}: is not in docs/api.md")
        if name not in DATA:
            found += [f"dbmpi.{name}: {what}" for what in missing(value)]
    return found


def missing(value: Any) -> Iterator[str]:
    """Yield what the docstring of a function or class does not say."""
    text = inspect.getdoc(value) or ""
    if not text or text.startswith(f"{value.__name__}("):  # what NamedTuple writes by itself
        yield "has no docstring"
        return
    described = set(parameters(text))
    if inspect.isclass(value):
        described |= fields(value)
        for name in getattr(value, "__annotations__", {}):
            if not name.startswith("_") and name not in described:
                yield f"does not describe the field {name!r}"
        return
    for name in inspect.signature(value).parameters:
        if name not in described:
            yield f"does not describe the argument {name!r}"
    for section in ("Returns", "Raises", "Examples"):
        if not re.search(rf"^{section}\n-+$", text, re.MULTILINE):
            yield f"has no section {section!r}"


def parameters(text: str) -> Iterator[str]:
    """Yield the names that the sections "Parameters" and "Attributes" of a docstring describe."""
    for section in re.split(r"\n(?=[A-Z][A-Za-z ]+\n-+\n)", text):
        title, _, body = section.partition("\n")
        if title not in ("Parameters", "Attributes"):
            continue
        entries = re.split(r"\n(?=\S)", body.partition("\n")[2])
        for entry in entries:
            names, _, description = entry.partition("\n")
            if description.strip():
                yield from (name.strip().lstrip("*") for name in names.partition(":")[0].split(","))


def fields(value: type) -> set[str]:
    """Return the fields of a class that have a docstring below them."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]
    assert isinstance(tree, ast.ClassDef)
    found = set()
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        ):
            found.add(field.target.id)
    return found


def home(name: str) -> str:
    """Return the full name of a public name: of the module that defines it."""
    value = getattr(dbmpi, name)
    module = importlib.import_module(value.__module__)
    assert getattr(module, name) is value
    return f"{value.__module__}.{name}"
