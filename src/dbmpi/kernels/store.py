"""Compiled kernels on disk: a file for each kernel, signature and processor, named by all that it is compiled from.

Numba's own cache keeps one index for all signatures of a function, which each process reads, extends and writes back:
of two processes that compile at the same time, one loses its entry, or both use the same file.  It also knows sources
by their path, so that another checkout or environment compiles everything again.  Here the name of a file is a digest
of the sources, the signature, the processor, and the compiler's versions and settings.  No file ever changes, a stale
one is never read again, and processes that need the same kernel at the same time wait for the first to compile it.

Numba's files are pickles.  They are kept in a directory that nobody else can write to.
"""

from __future__ import annotations

import hashlib
import re
import sys
import threading
from contextlib import ExitStack
from functools import cache
from importlib import metadata
from pathlib import Path
from types import CodeType
from typing import Any, ClassVar

import numba
import numpy as np
from numba.core.caching import IndexDataCacheFile, NullCache
from numba.core.compiler import CompileResult
from numba.core.runtime.nrt import rtsys

from dbmpi.machine import kernel_cache

_COMPILING_SECONDS = 120.0
"""How long a process waits for another one that compiles the same kernel, before it compiles the kernel itself."""

_FOLDER = Path(__file__).parent
_IMPORTS = re.compile(r"^from dbmpi\.kernels(?:\.([\w.]+) import | import (.+))", re.MULTILINE)
_SETTINGS = ("OPT", "BOUNDSCHECK", "DEBUGINFO_DEFAULT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "USING_SVML")


class KernelStore(NullCache):
    """The compiled code of one function, in place of Numba's cache for it.

    Parameters
    ----------
    function
        The function as it was written; the qualified name tells apart what a factory makes from the same code.
    """

    unkept: ClassVar[str] = ""
    """Why compiled code could not be kept on disk; empty if it could."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self._compiling = threading.local()
        """For each thread, the locks that it holds while it compiles."""

    @property
    def cache_path(self) -> str | None:
        """The directory of the files."""
        directory = _directory()
        return None if directory is None else str(directory)

    def compile_once(self, compile_: Any) -> Any:
        """Wrap Numba's function `compile_`, which finds or compiles code, so that one process at a time compiles it."""

        def compile_alone(sig: Any) -> Any:
            with ExitStack() as self._compiling.locks:  # released even if it cannot be compiled
                return compile_(sig)

        return compile_alone

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the code for the signature `sig` in `target_context`; None if this process has to compile it.

        Numba's own cache first imports whatever can be compiled, SciPy included, which takes longer than all else in
        the start of a small run.  Code that is there needs Numba's memory management alone; and compiling imports the
        rest by itself.
        """
        if Path(self._function.__code__.co_filename).is_relative_to(_FOLDER):
            rtsys.initialize(target_context)
        else:  # a user's kernel may call anything
            target_context.refresh()
        codegen = target_context.codegen()
        if (base := self._base(sig, codegen)) is None:
            return None
        key = _key(sig, codegen)
        content = _load(base, key)
        if content is None and not self._compiling.locks.enter_context(kernel_cache.locked(_data(base), 0.0)):
            # On a full disk there will be nothing to load.
            with kernel_cache.locked(_data(base), 0.0 if KernelStore.unkept else _COMPILING_SECONDS):
                content = _load(base, key)
        elif content is None:
            content = _load(base, key)  # it may have been compiled since the first look
        return None if content is None else CompileResult._rebuild(target_context, *content)  # type: ignore[no-untyped-call]

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep `data`, the code for the signature `sig`, if other processes can use it."""
        base = self._base(sig, data.codegen)
        if base is None or data.lifted or data.library.has_dynamic_globals:
            return
        files = _files(base)
        try:
            files.flush()  # what was not written to the end may be in the way
            files.save(_key(sig, data.codegen), data._reduce())
        except OSError as error:  # a disk that is full, or has become read-only
            KernelStore.unkept = str(error)

    def _base(self, sig: Any, codegen: Any) -> Path | None:
        """Return the path of the files of a signature, without suffix; None if it cannot be kept."""
        directory, sources = _directory(), source_digest(self._function)
        if directory is None or sources is None:
            return None
        function = self._function
        parts = (
            function.__module__,
            function.__qualname__,
            code_text(function.__code__),
            sources,
            str(sig),
            repr(codegen.magic_tuple()),
            _compiler(),
        )
        digest = hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
        return directory / f"{function.__name__}-{digest}"


def code_text(code: CodeType) -> str:
    """Return a text that is the same for the same `code` in another checkout: all but the path of its file."""
    constants = [code_text(value) if isinstance(value, CodeType) else repr(value) for value in code.co_consts]
    return repr((code.co_code.hex(), constants, code.co_names, code.co_varnames, code.co_freevars))


def source_digest(function: Any) -> str | None:
    """Return a digest of the sources that the kernel `function` is compiled from; None where they are no file.

    Functions from other folders may depend on more than `sources_of` finds: only their path tells these apart.
    """
    return _digest_of(function.__code__.co_filename)


def sources_of(file: Path) -> dict[Path, bytes]:
    """Return a file's content, and that of all files of this folder that it may have imported, directly or not.

    A file of this folder imports by lines that begin with ``from dbmpi.kernels``; another one may do so in any way.
    """
    sources: dict[Path, bytes] = {}
    wanted = [file] if file.is_relative_to(_FOLDER) else [file, *_FOLDER.rglob("*.py")]
    while wanted:
        path = wanted.pop()
        if path in sources:
            continue
        sources[path] = path.read_bytes()
        for module, names in _IMPORTS.findall(sources[path].decode()):
            found = [module] if module else [name.split()[0] for name in names.split(",")]
            wanted += [_FOLDER.joinpath(*name.split(".")).with_suffix(".py") for name in found]
    return sources


@cache
def _digest_of(file: str) -> str | None:
    try:
        sources = sources_of(Path(file))
    except (OSError, UnicodeDecodeError):
        return None
    digest = hashlib.blake2s(digest_size=8)
    for path in sorted(sources, key=lambda path: path.name):
        where = path.relative_to(_FOLDER) if path.is_relative_to(_FOLDER) else path
        digest.update(f"{where} {hashlib.blake2s(sources[path]).hexdigest()}\n".encode())
    return digest.hexdigest()


@cache
def _compiler() -> str:
    """Return the versions and the settings that the compiled code depends on."""
    settings = [getattr(numba.config, name, None) for name in _SETTINGS]
    return repr((sys.version, numba.__version__, metadata.version("llvmlite"), np.__version__, settings))


@cache
def _directory() -> Path | None:
    """Return the directory of the files, which nobody else can write to; None if there is none."""
    chosen = numba.config.CACHE_DIR  # type: ignore[attr-defined]
    return kernel_cache.private_part(Path(chosen), "kernels") if chosen else None


def _key(sig: Any, codegen: Any) -> Any:
    return sig, codegen.magic_tuple()


def _files(base: Path) -> Any:
    """Return Numba's reader and writer of the files of one signature."""
    return IndexDataCacheFile(str(base.parent), base.name, base.name)  # type: ignore[no-untyped-call]


def _data(base: Path) -> Path:
    """Return the file that Numba keeps the code in: empty, and locked, while the code is being compiled."""
    return base.with_name(f"{base.name}.1.nbc")


def _load(base: Path, key: Any) -> Any:
    """Return what is kept for a signature; None where there is nothing, or it was not written to the end."""
    try:
        return _files(base).load(key)
    except Exception:  # unpickling raises anything: whatever cannot be read is compiled again
        return None
