"""Every public function describes its arguments: in a section where there are many, anywhere in its text otherwise."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "dbmpi"
MANY = 4
"""From so many arguments on, a list is easier to read than a sentence."""
SECTION = re.compile(r"^(?:Parameters|Attributes)\n-{3,}\n(.*?)(?=^\w[\w ]*\n-{3,}\n|\Z)", re.MULTILINE | re.DOTALL)


def arguments(function: ast.FunctionDef) -> list[str]:
    """Return the names that a caller may give."""
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    return [each.arg for each in every if each.arg not in ("self", "cls") and not each.arg.startswith("_")]


def undescribed(function: ast.FunctionDef, text: str) -> list[str]:
    """Return the arguments that the docstring `text` does not name where it should."""
    names = arguments(function)
    where = "\n".join(SECTION.findall(text)) if len(names) >= MANY else text
    return [name for name in names if not re.search(rf"(?<![\w.]){name}(?!\w)", where)]


def ancestors(known: dict[str, ast.ClassDef], node: ast.ClassDef) -> Iterator[ast.ClassDef]:
    """Yield the bases of a class that are classes of this package, and theirs."""
    for base in node.bases:
        name = base.value if isinstance(base, ast.Subscript) else base
        if isinstance(name, ast.Name) and name.id in known:
            yield known[name.id]
            yield from ancestors(known, known[name.id])


def documented(known: dict[str, ast.ClassDef], node: ast.stmt) -> Iterator[tuple[str, ast.FunctionDef, str]]:
    """Yield the name of each public function of a definition, the function, and the text that describes it."""
    if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
        yield node.name, node, ast.get_docstring(node) or ""
    if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
        return
    for method in node.body:
        if not isinstance(method, ast.FunctionDef):
            continue
        if method.name == "__init__":
            yield node.name, method, (ast.get_docstring(node) or "") + (ast.get_docstring(method) or "")
        elif not method.name.startswith("_"):
            family = [node, *ancestors(known, node)]
            same = [one for each in family for one in each.body if getattr(one, "name", "") == method.name]
            texts = [ast.get_docstring(one) or "" for one in same if isinstance(one, ast.FunctionDef)]
            yield f"{node.name}.{method.name}", method, "\n".join(texts)


def faults(files: list[Path]) -> tuple[int, list[str]]:
    """Return how many public functions there are, and a line for each that leaves something undescribed."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}
    known = {node.name: node for tree in trees.values() for node in tree.body if isinstance(node, ast.ClassDef)}
    count, lines = 0, []
    for path, tree in trees.items():
        for name, function, text in (each for node in tree.body for each in documented(known, node)):
            count += 1
            left = undescribed(function, text)
            if left or not text:
                lines.append(f"{path.name}:{function.lineno}: {name}: {', '.join(left) or 'no docstring'}")
    return count, lines


def test_public_functions_describe_their_arguments() -> None:
    files = [path for path in sorted(SOURCE.glob("**/*.py")) if path.relative_to(SOURCE).parts[0] != "examples"]
    count, lines = faults(files)
    assert count > 1000
    assert lines == []


def test_what_is_left_undescribed_would_be_found(tmp_path: Path) -> None:
    path = tmp_path / "some.py"
    path.write_text(
        "class Base:\n    def f(self, inherited):\n        '''Use inherited.'''\n\n\n"
        "class Own(Base):\n    def __init__(self, size):\n        pass\n\n"
        "    def f(self, inherited):\n        pass\n\n\n"
        "def few(a, b):\n    '''Add a.'''\n\n\n"
        "def many(a, b, c, d):\n    '''Use a, b, c and d.'''\n\n\n"
        "def none():\n    pass\n\n\ndef _private(a):\n    pass\n"
    )
    count, lines = faults([path])
    assert count == 6
    assert [line.split(": ", 1)[1] for line in lines] == [
        "Own: size",
        "few: b",
        "many: a, b, c, d",
        "none: no docstring",
    ]
