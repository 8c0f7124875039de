"""The documentation says what the code does: generated pages, public names, quoted messages, blocks that are run."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import itertools
import json
import os
import re
import shutil
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from unit.documentation import RUNNABLE, Block, blocks

import dbmpi
from dbmpi import config

PROJECT = Path(__file__).parents[2]
DOCS = PROJECT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), PROJECT / "CONTRIBUTING.md"]
GENERATED = ("command-line.md", "configuration.md")
PAGES_IN_ROOT = ("CONTRIBUTING.md", "CHANGELOG.md")


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, PROJECT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Generated


def test_the_page_of_commands_is_what_the_parsers_say():
    written = (DOCS / "command-line.md").read_text(encoding="utf-8")
    assert written == tool("write_command_line_docs").text(), "run: python tools/write_command_line_docs.py"


def test_the_page_of_commands_has_every_option():
    """An outside judge of the tool: what argparse itself prints."""
    from dbmpi.cli import main

    page = (DOCS / "command-line.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## `dbmpi ([a-z ]+)`\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    assert {words.split()[0] for words in sections} == set(main.COMMANDS)
    for words, section in sections.items():
        parser = main.build_parser(words.split())
        for word in words.split():
            parser = next(a.choices for a in parser._actions if isinstance(a.choices, dict))[word]
        options = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", parser.format_help())) - {"-h", "--help", "--"}
        assert {option for option in options if option not in section} == set(), words


def test_the_diagrams_are_what_the_tool_draws():
    for name, text in tool("draw_diagrams").files().items():
        assert (DOCS / "images" / name).read_text(encoding="utf-8") == text, "run: python tools/draw_diagrams.py"


def test_the_diagram_of_folders_has_the_order_of_imports():
    from unit.test_imports import ROWS

    rows = [[ROWS[name] for name in names] for _, names in tool("draw_diagrams").FOLDERS]
    assert all(min(above) >= max(below) for above, below in itertools.pairwise(rows))
    assert {name for _, names in tool("draw_diagrams").FOLDERS for name in names} == {
        path.parent.name for path in (PROJECT / "src" / "dbmpi").glob("*/__init__.py")
    }


# Public names


def test_public_names_are_documented():
    assert tool("documented").problems((DOCS / "api.md").read_text(encoding="utf-8")) == []


def test_what_is_not_documented_would_be_found():
    def function(given, forgotten):
        """Do something.

        Parameters
        ----------
        given : int
            A number.
        nameless : int

        Returns
        -------
        int
            Another.

        Examples
        --------
        >>> 1
        1
        """

    class Fields:
        """Some fields."""

        first: int
        """Described."""
        second: int

    documented = tool("documented")
    assert list(documented.missing(function)) == [
        "does not describe the argument 'forgotten'",
        "has no section 'Raises'",
    ]
    assert list(documented.missing(Fields)) == ["does not describe the field 'second'"]
    assert "dbmpi.train: is not in docs/api.md" in documented.problems("::: dbmpi.training")


def test_the_sections_of_a_run_are_on_the_page():
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    not_for_users = {"LAYERS", "AnyLayer", "BuiltInLayer", "Section", "explain", "load", "Run"}
    assert [name for name in config.__all__ if name not in not_for_users and f"`{name}`" not in page] == []


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The files that the first command of many pages makes."""
    from dbmpi.data.importers.digits import import_digits

    place = tmp_path_factory.mktemp("digits") / "data"
    import_digits(place)
    return place


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", [name for name in dbmpi.__all__ if callable(getattr(dbmpi, name))])
def test_examples_of_public_names_are_right(name, tmp_path, monkeypatch, request):
    if "examples/" in (getattr(dbmpi, name).__doc__ or ""):
        shutil.copytree(PROJECT / "examples", tmp_path / "examples")
        shutil.copytree(request.getfixturevalue("digits"), tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    finder = doctest.DocTestFinder(recurse=False)
    for test in finder.find(getattr(dbmpi, name), name, globs={}):
        assert runner.run(test).failed == 0


# Messages


def templates() -> list[str]:
    """Return all texts in the source but docstrings, with a null character for each value that is filled in."""
    found = []
    for path in (PROJECT / "src").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if id(node) in docstrings:
                continue
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def quoted(page: str) -> list[str]:
    return re.findall(r"^### `+ ?(.*?) ?`+$", page.partition("## Messages of other programs")[0], re.MULTILINE)


def is_in(message: str, texts: list[str]) -> bool:
    """Return whether a text has the fixed parts of a message, in their order."""
    parts = [part.strip() for part in message.split("…")]
    pattern = re.compile(".*".join(re.escape(part) for part in parts if part), re.DOTALL)
    return any(pattern.search(text) for text in texts)


def test_quoted_messages_exist():
    messages, texts = quoted((DOCS / "troubleshooting.md").read_text(encoding="utf-8")), templates()
    assert len(messages) > 40
    assert [message for message in messages if not is_in(message, texts)] == []


def test_a_message_that_does_not_exist_would_be_found():
    assert is_in("…: no such thing; expected …", ["\0: no such thing; expected a \0"])
    assert not is_in("expected …: no such thing", ["\0: no such thing; expected a \0"])


# Blocks


def stem(page: Path) -> str:
    return page.stem


@pytest.mark.parametrize("page", PAGES, ids=stem)
def test_every_block_is_run_or_says_why_not(page):
    found = blocks(page.read_text(encoding="utf-8"))
    assert [f"{page.name}:{block.line}" for block in found if block.language in RUNNABLE and not block.label] == []


@pytest.mark.parametrize("page", PAGES, ids=stem)
def test_configurations_that_are_shown_are_valid(page, tmp_path):
    """Each block of TOML, completed by data and layers where it is a fragment."""
    complete = {"data": {"train": "train.h5"}, "network": {"layers": [{"type": "dense", "units": 2}]}}
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language == "toml":
            shown = tomllib.loads(block.code)
            needed = {"data"} if "objective" in shown else {*complete}
            sections = {name: complete.get(name, {}) | shown.get(name, {}) for name in {*needed, *shown}}
            config.Run.model_validate_json(json.dumps(sections))


WORDS = re.compile(
    r"\b(who|whoever|whom|he|him|his|somebody|nobody|nap|naps)\b|\b(is|are) to be told\b"
    r"|\bcomes? to (rest|an end|its end|their end)\b|\blet in\b|\bgone on\b"
)
"""Words for people that are not meant for processes, and phrases that a reader stumbles over."""


@pytest.mark.parametrize("page", [*PAGES, PROJECT / "README.md"], ids=stem)
def test_pages_are_in_plain_words(page):
    if page.name in GENERATED:
        pytest.skip("its sentences are those of the code")
    text = page.read_text(encoding="utf-8")
    lines = enumerate(text.splitlines(), 1)
    assert [f"{page.name}:{number}: {line}" for number, line in lines if WORDS.search(line)] == []


def test_the_tests_that_are_named_exist():
    named = re.findall(r"tests/[\w/]+\.py", (PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert named
    assert [name for name in named if not (PROJECT / name).is_file()] == []


def command(block: Block, here: Path) -> list[str]:
    """Return the command that runs a block."""
    if block.language == "sh":
        return ["bash", "-euo", "pipefail", "-c", block.code]
    (here / "block.py").write_text(block.code, encoding="utf-8")
    return [sys.executable, "block.py"]


def typed(page: Path) -> list[Block]:
    """Return the blocks that are typed for a page: its own, then those of other pages that continue where it ends."""
    others = [block for other in PAGES if other != page for block in blocks(other.read_text(encoding="utf-8"))]
    return blocks(page.read_text(encoding="utf-8")) + [block for block in others if block.continues == page.stem]


def test_blocks_continue_pages_that_exist():
    continued = {block.continues for page in PAGES for block in blocks(page.read_text(encoding="utf-8"))} - {None}
    assert continued
    assert continued <= {page.stem for page in PAGES if "<!-- test: quick -->" in page.read_text(encoding="utf-8")}


IMPORT = "dbmpi data import digits --out data\n"
"""What many pages begin with, in a directory without data."""


@pytest.fixture(scope="module")
def typed_data():
    """Return a list for what `IMPORT` has made: it is typed for the first page, and the others get a copy."""
    return []


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "page", [page for page in PAGES if "<!-- test: quick -->" in page.read_text("utf-8")], ids=stem
)
def test_a_page_can_be_typed(page, tmp_path, tmp_path_factory, launch, typed_data):
    """In a directory with nothing in it, block after block."""
    environment = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_mpi_yield_when_idle": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",  # however few cores there are
    }
    for block in typed(page):
        if block.saved_as:
            (tmp_path / block.saved_as).write_text(block.code, encoding="utf-8")
        elif block.is_run:
            left = block
            if IMPORT in block.code and typed_data:
                shutil.copytree(typed_data[0], tmp_path / "data")
                left = replace(block, code=block.code.replace(IMPORT, "", 1))
            done = launch(None, command(left, tmp_path), 180, environment, tmp_path)
            assert done.returncode == 0, f"{page.name}:{block.line}\n{done.transcript}"
            assert not done.left
            if IMPORT in left.code:
                typed_data.append(shutil.copytree(tmp_path / "data", tmp_path_factory.mktemp("typed") / "data"))


# The site


def test_every_page_is_in_the_navigation():
    navigation = re.findall(
        r"^ +- .*: ([\w.-]+\.md)$", (PROJECT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(navigation) == sorted([*(path.name for path in DOCS.glob("*.md")), *PAGES_IN_ROOT])
