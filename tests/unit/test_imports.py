"""What may import what, what must not be imported at all, and what a mere ``--help`` may cost."""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SOURCE.glob("dbmpi/**/*.py"))
}

# docs/architecture.md, "Folders": a module imports from its own folder and from those in the rows above here.
ORDER = (
    ("index", "errors", "objective"),
    ("config", "machine", "monitor", "result"),
    ("kernels",),
    ("mpi", "network"),
    ("methods", "paramserver", "replica"),
    ("checkpoint", "_arguments", "plan"),
    ("data", "_minimize", "loops"),
    ("session",),
    ("downpour", "jax", "sandblaster", "torch"),
    ("simulation",),
    ("runs",),
    ("formats",),
    ("cli",),
    ("__main__",),
)
ROWS = {folder: row for row, folders in enumerate(ORDER) for folder in folders}
WITHOUT_MPI = (
    "dbmpi.index",
    "dbmpi.errors",
    "dbmpi.objective",
    "dbmpi.config",
    "dbmpi.kernels",
    "dbmpi.machine",
    "dbmpi.network",
    "dbmpi.methods",
    "dbmpi.plan",
    "dbmpi.paramserver.rules",
    "dbmpi.checkpoint.schema",
    "dbmpi.checkpoint.new_file",
    "dbmpi.data.importers",
    "dbmpi.data.source",
    "dbmpi.data.stream",
)
HEAVY = ("numpy", "mpi4py", "numba", "h5py", "scipy", "matplotlib", "pydantic", "rich", "sklearn", "onnx")
PICKLING = {
    *("send", "recv", "bsend", "ssend", "isend", "irecv", "ibsend", "issend", "sendrecv", "mprobe", "improbe"),
    *("bcast", "gather", "scatter", "allgather", "alltoall", "reduce", "allreduce", "scan", "exscan"),
    *("ibcast", "igather", "iallgather", "iallreduce", "ireduce"),
}
COMMUNICATOR = re.compile(r"(comm|world|node)$", re.IGNORECASE)


def trees() -> Iterator[tuple[str, ast.Module]]:
    for name, path in MODULES.items():
        yield name, ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(name: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and the full name of everything that a module imports, also late and for type checks."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{origin}.{alias.name}"
                yield node.lineno, full if full in MODULES else origin


def folder(name: str) -> str:
    """Return the folder, or the file of the top level, that a module belongs to."""
    return name.split(".")[1]


def test_every_folder_has_its_row():
    assert {folder(name) for name in MODULES if name != "dbmpi"} == set(ROWS)


def test_imports_go_one_way():
    wrong = []
    for name, tree in trees():
        for line, imported in imports(name, tree):
            # The root holds the version; what else it offers is loaded late.
            if name == "dbmpi" or imported.partition(".")[0] != "dbmpi" or imported == "dbmpi":
                continue
            if folder(imported) != folder(name) and ROWS[folder(imported)] >= ROWS[folder(name)]:
                wrong.append(f"{name}:{line} imports {imported}")
    assert wrong == []


def test_what_needs_no_mpi_does_not_import_it():
    wrong = [
        f"{name}:{line}"
        for name, tree in trees()
        if name.startswith(WITHOUT_MPI)
        for line, imported in imports(name, without_type_checks(tree))
        if imported.partition(".")[0] == "mpi4py"
    ]
    assert wrong == []


def without_type_checks(tree: ast.Module) -> ast.Module:
    """Return a module without what only type checkers read: the type of a communicator is no import of MPI."""
    kept = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))]
    return ast.Module(kept, [])


@pytest.mark.slow
@pytest.mark.slow
def test_what_needs_no_mpi_can_be_imported_without_one():
    names = [name for name in MODULES if name.startswith(WITHOUT_MPI)]
    assert len(names) > len(WITHOUT_MPI)
    program = f"import importlib, sys\nsys.modules['mpi4py'] = None\nfor name in {names}: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def uses(*, attributes: set[str] = frozenset(), names: set[str] = frozenset()) -> set[str]:
    """Return the modules in which one of these attributes or names occurs as code."""
    return {
        name
        for name, tree in trees()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in attributes)
        or (isinstance(node, ast.Name) and node.id in names)
        or (isinstance(node, ast.alias) and node.name in attributes)
    }


def test_one_module_names_the_world():
    assert uses(attributes={"COMM_WORLD", "COMM_SELF"}) == {"dbmpi.mpi.world"}


def test_one_module_touches_windows():
    assert uses(attributes={"Win"}) == {"dbmpi.mpi.window"}


def test_few_modules_write_instructions():
    names = {name for name, path in MODULES.items() if re.search(r"(?m)^\s*(from|import) llvmlite", path.read_text())}
    assert names
    assert {name.rpartition(".")[0] for name in names} == {"dbmpi.kernels.llvm"}


def test_nothing_unpickles_evaluates_or_starts_a_shell():
    banned = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    wrong = []
    for name, tree in trees():
        wrong += [f"{name}:{line} {what}" for line, what in imports(name, tree) if what.partition(".")[0] in banned]
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec", "__import__"):
                wrong.append(f"{name}:{node.lineno} {node.func.id}")
            if isinstance(node.func, ast.Attribute) and ast.unparse(node.func) in ("os.system", "os.popen"):
                wrong.append(f"{name}:{node.lineno} {ast.unparse(node.func)}")
            wrong += [
                f"{name}:{node.lineno} {keyword.arg}"
                for keyword in node.keywords
                if keyword.arg in ("shell", "allow_pickle")
                and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
            ]
    assert wrong == []


def test_messages_are_buffers():
    """mpi4py's lower-case methods pickle.

    Here communicators are known by their names; the harness makes the methods fail under whatever name, but only where
    a test goes by.
    """
    assert [f"{name}:{line} {call}" for name, tree in trees() for line, call in pickling_calls(tree)] == []


def test_a_pickled_message_would_be_found():
    program = "self._comm.allreduce(1)\nmailbox.send(2)\nnumpy.add.reduce(x)\nnode.Bcast(x)\nworld.bcast(x)"
    assert list(pickling_calls(ast.parse(program))) == [(1, "self._comm.allreduce"), (5, "world.bcast")]


def pickling_calls(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value)
            if node.func.attr in PICKLING and COMMUNICATOR.search(owner):
                yield node.lineno, f"{owner}.{node.func.attr}"


def loaded_by(program: str, *arguments: str) -> tuple[set[str], str]:
    """Return which heavy packages a program has loaded when it ends, and what it printed."""
    watched = (
        "import atexit, json, sys\n"
        f"show = lambda: print(json.dumps([m for m in {HEAVY} if m in sys.modules]), file=sys.stderr)\n"
        f"atexit.register(show)\nsys.argv = ['dbmpi', *{arguments}]\n{program}"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COV")}
    done = subprocess.run([sys.executable, "-c", watched], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1])), done.stdout


def test_importing_dbmpi_loads_nothing_heavy():
    assert loaded_by("import dbmpi")[0] == set()


def test_the_public_names_are_listed_before_they_are_loaded():
    program = "import dbmpi; print(set(dbmpi.__all__) <= set(dir(dbmpi)), 'import_module' in dir(dbmpi))"
    assert loaded_by(program) == (set(), "True False\n")


@pytest.mark.slow
def test_training_from_python_finds_mpi_prepared_and_may_be_repeated():
    """The module `dbmpi.train` does not take the place of the function, and no MPI complains of its settings."""
    program = "import dbmpi; print(dbmpi.train is dbmpi.train, callable(dbmpi.train))"
    environment = {name: value for name, value in os.environ.items() if name != "OMPI_MCA_osc"}
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert (done.stdout.strip(), done.stderr) == ("True True", "")


def commands() -> Iterator[list[str]]:
    """Yield the words of all commands, with those that have commands of their own."""
    from dbmpi.cli import main

    yield []
    for name in main.COMMANDS:
        yield from below(choices(main.build_parser([name]))[name], [name])


def below(parser: argparse.ArgumentParser, words: list[str]) -> Iterator[list[str]]:
    yield words
    for name, child in choices(parser).items():
        yield from below(child, [*words, name])


def choices(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next((action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)), {})


@pytest.mark.parametrize("command", list(commands()), ids=" ".join)
def test_help_loads_nothing_heavy(command):
    loaded, printed = loaded_by("from dbmpi.cli.main import main; sys.exit(main())", *command, "--help")
    assert loaded == set()
    assert printed.startswith(f"usage: {' '.join(['dbmpi', *command])} ")
