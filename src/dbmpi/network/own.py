"""Layers of a user's own: from ``module:Class`` in a configuration to a layer that keeps the contract.

(`member` serves batch methods of a user's own, too.)

A configuration, or a checkpoint, only names a class.  The caller that makes a network says where such classes may come
from; by default none is loaded, because loading one runs the code of its file.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from dbmpi import config
from dbmpi.errors import RunFailed, UserError
from dbmpi.index.layout import Tensor
from dbmpi.network.layer import Layer

Loader = Callable[[str, str], Any]
"""Returns what ``module:name``, the first argument, names; the second says what is of that type, for messages."""

_METHODS = ("input_box", "tensor_box", "flops", "initial", "forward", "backward")
_ATTRIBUTES = ("name", "input_shape", "output_shape", "tensors")
_NOT_THE_USERS = (
    *map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")),
    str(Path(__file__).parents[1]),
    "<frozen ",
)
"""Prefixes of the names of files that belong to Python, installed packages or dbmpi."""


def refuse(kind: str, what: str) -> Any:
    """Raise UserError instead of loading `kind`, the type of `what`: the `Loader` for untrusted files."""
    raise UserError(
        f"{what} is of type {kind!r}: that is code which does not belong to dbmpi, and it is not run because "
        f"a file names it; if you trust it, say so: --allow-code {_file_of(kind)}, or from Python name the file in the "
        "call"
    )


def from_directory(directory: Path | None) -> Loader:
    """Look for modules in a directory first, then where Python finds modules: for a user's own configuration."""

    def load(kind: str, what: str) -> Any:
        return member(kind, what, directory)

    return load


def from_files(files: Sequence[Path]) -> Loader:
    """Load modules from just these files, which the user has named for this purpose."""

    def load(kind: str, what: str) -> Any:
        module = kind.partition(":")[0].split(".")
        suiting = [file for file in files if [*file.resolve().parts[-len(module) : -1], file.stem] == module]
        if not suiting:
            if not files:
                refuse(kind, what)
            raise UserError(
                f"{what} is of type {kind!r}, but you allow only code in {', '.join(map(str, files))}; "
                f"expected the file that defines it, {_file_of(kind)}"
            )
        if not suiting[0].is_file():
            raise UserError(
                f"{suiting[0]}: no such file, and you allow its code; expected the one that defines {kind!r}"
            )
        found = member(kind, what, suiting[0].resolve().parents[len(module) - 1])
        # The user trusts this file, and not all that it imports, with arguments that another file chooses.
        if getattr(found, "__module__", None) != ".".join(module):
            raise UserError(
                f"{what} is of type {kind!r}, which {suiting[0]} does not define itself; expected its own class"
            )
        return found

    return load


def make(section: config.OwnLayer, name: str, input_shape: tuple[int, ...], load: Loader) -> Layer:
    """Make the layer that a configuration describes.

    Parameters
    ----------
    section
        Type and settings.
    name, input_shape
        Of the layer.
    load
        Where the class may come from.

    Raises
    ------
    UserError
        If the class may not be loaded or cannot be found, is no layer, does not take the settings, or makes a layer
        whose name, shapes or tensors are wrong.
    """
    kind = section.type
    found = load(kind, f"layer {name!r}")
    _check_class(found, kind, name)
    try:
        inspect.signature(found).bind(name, input_shape, **section.settings)
    except TypeError as error:
        raise UserError(
            f"layer {name!r}: {kind} cannot be called with the settings of its table: {error}; it is called with "
            f"(name, input_shape, **settings) and takes {inspect.signature(found)}"
        ) from None
    with calling(f"layer {name!r}", "its class is called"):
        layer = found(name, input_shape, **section.settings)
    with calling(f"layer {name!r}", "it is asked for its shapes and tensors"):
        _check_description(layer, kind, name, input_shape)
    made: Layer = layer
    return made


def make_objective(section: config.ObjectiveSection, load: Loader) -> Any:
    """Make the objective that a configuration describes; raises UserError as `make` does for layers.

    Parameters
    ----------
    section
        What to use, and settings.
    load
        Where the class may come from.
    """
    found = load(section.use, "the objective")
    if not isinstance(found, type) or not learns(found):
        raise UserError(
            f"the objective is of type {section.use!r}: expected a class with a method 'loss_and_gradient(parameters, "
            "batch)'; dbmpi.objective.OwnObjective says what an objective has"
        )
    try:
        inspect.signature(found).bind(**section.settings)
    except TypeError as error:
        raise UserError(
            f"the objective is of type {section.use!r}, which cannot be called with the settings of its table: {error};"
            " if it was given to dbmpi.train as an object, give it to dbmpi.evaluate, too: objective=..."
        ) from None
    with calling("the objective", "it is made"):
        return found(**section.settings)


def learns(objective: Any) -> bool:
    """Return whether an `objective`, or a class of ones, has a method that computes a gradient."""
    return any(callable(getattr(objective, method, None)) for method in ("loss_and_gradient", "write_gradient"))


@contextmanager
def calling(what: str, when: str) -> Iterator[None]:
    """Turn an exception of a user's code into a UserError that says `what` fails `when`, and names the line."""
    try:
        yield
    except (UserError, RunFailed):
        raise
    except (Exception, SystemExit) as error:  # an exit here would look like success
        raise UserError(f"{what} fails when {when}: {_where(error)}") from error


def _where(error: BaseException) -> str:
    """Describe an exception with the last line of the user's own code in its traceback."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    last = next((frame for frame in reversed(frames) if not frame.filename.startswith(_NOT_THE_USERS)), frames[-1])
    return f"{type(error).__name__}: {error} ({last.filename}, line {last.lineno})"


def member(kind: str, where: str, directory: Path | None) -> Any:
    """Return the object that `kind`, ``module:name``, names; its module is looked for in `directory` first.

    Raises
    ------
    UserError
        If it is missing or cannot be loaded; the message begins with `where`, the setting that names it.
    """
    module, _, name = kind.partition(":")
    if directory is not None and not directory.is_dir():
        raise UserError(f"{where}: network.code = {str(directory)!r}: expected the directory of {_file_of(kind)}")
    try:
        loaded = _imported(module, directory)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise UserError(f"{where}: {module!r} cannot be loaded: {error}") from error
        searched = f"{directory} has no {_file_of(kind)}, and Python finds" if directory is not None else "Python finds"
        raise UserError(f"{where}: {searched} no module {module!r}") from None
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{where}: {module!r} cannot be loaded: {_where(error)}") from error
    if not hasattr(loaded, name):
        raise UserError(f"{where}: {loaded.__file__} defines no {name!r}")
    return getattr(loaded, name)


def _imported(module: str, directory: Path | None) -> ModuleType:
    """Import a module, its outermost package from the directory if it is there."""
    top = module.partition(".")[0]
    first = "" if directory is None else str(directory.resolve())
    spec = PathFinder.find_spec(top, [first]) if first else None
    if spec is not None and spec.loader is not None and spec.origin is not None:
        loaded = sys.modules.get(top)
        if loaded is not None and loaded.__file__ != spec.origin:
            raise UserError(
                f"{spec.origin}: there is another module {top!r} already, {loaded.__file__ or 'a part of Python'}; "
                "give the file another name"
            )
        # The directory comes last, so that its files do not replace modules that others import.
        if first not in sys.path:
            sys.path.append(first)
        if loaded is None:
            made = module_from_spec(spec)
            sys.modules[top] = made
            try:
                spec.loader.exec_module(made)
            except BaseException:
                del sys.modules[top]
                raise
    return importlib.import_module(module)


def _check_class(found: Any, kind: str, name: str) -> None:
    """Check, before anything of it is called, that a class has the methods of a layer."""
    if not isinstance(found, type):
        raise UserError(f"layer {name!r}: {kind} is not a class but a {type(found).__name__}")
    missing = [method for method in _METHODS if not callable(getattr(found, method, None))]
    if missing:
        raise UserError(
            f"layer {name!r}: {kind} is no layer: it has no {', '.join(missing)}; "
            "dbmpi.network.layer.Layer says what a layer has"
        )
    for method in _METHODS:
        expected = inspect.signature(getattr(Layer, method)).parameters.values()
        bound = isinstance(inspect.getattr_static(found, method), staticmethod | classmethod)
        positional = [p for p in expected if p.kind is p.POSITIONAL_OR_KEYWORD][int(bound) :]
        keywords = {p.name: None for p in expected if p.kind is p.KEYWORD_ONLY}
        try:
            inspect.signature(getattr(found, method)).bind(*positional, **keywords)
        except TypeError:
            given = inspect.signature(getattr(found, method))
            raise UserError(
                f"layer {name!r}: {kind}.{method} takes {given}, expected {inspect.signature(getattr(Layer, method))}"
            ) from None


def _check_description(layer: Any, kind: str, name: str, input_shape: tuple[int, ...]) -> None:
    """Check the name, the shapes and the tensors of a layer."""
    # A property that exists and raises is reported below.
    missing = [a for a in _ATTRIBUTES if not hasattr(layer, a) and not hasattr(type(layer), a)]
    if missing:
        raise UserError(f"layer {name!r}: {kind} is no layer: it has no {', '.join(missing)}")
    if layer.name != name:
        raise UserError(f"layer {name!r}: {kind} calls itself {layer.name!r}; expected the name that it is given")
    if layer.input_shape != input_shape:
        raise UserError(f"layer {name!r}: its input_shape is {layer.input_shape!r}, but it is given {input_shape}")
    if not _is_shape(layer.output_shape):
        raise UserError(
            f"layer {name!r}: its output_shape is {layer.output_shape!r} for inputs of shape {input_shape}; "
            "expected a tuple of integers, of Python's type int, that are at least 1"
        )
    if not isinstance(layer.tensors, Mapping):
        raise UserError(f"layer {name!r}: its tensors are {type(layer.tensors).__name__}; expected a dictionary")
    for short, tensor in layer.tensors.items():
        if not isinstance(tensor, Tensor) or not _is_shape(tensor.shape) or tensor.name != f"{name}/{short}":
            raise UserError(
                f"layer {name!r}: the tensor {short!r} is {tensor!r}; expected "
                f"Tensor({f'{name}/{short}'!r}, shape) with a tuple of integers that are at least 1"
            )


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, tuple) and len(shape) > 0 and all(type(n) is int and n >= 1 for n in shape)


def _file_of(kind: str) -> str:
    return kind.partition(":")[0].replace(".", "/") + ".py"
