"""``dbmpi example``: list the examples and batch scripts that come with dbmpi, or write one into a directory."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "list the examples and batch scripts that come with dbmpi, or write one into a directory"

_FOLDERS = ("examples", "slurm")
"""Of this package: links to the folders of the repository, whose files are copied into wheels."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its `parser`."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="which one to write; without it all are listed")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(),
        metavar="DIRECTORY",
        help="where to write it (default: the current directory)",
    )


def run(arguments: argparse.Namespace) -> int:
    """List the examples, or write the files of the one in `arguments`; nothing is overwritten."""
    known = examples()
    if arguments.name is None:
        width = max(map(len, known))
        for name, files in known.items():
            print(f"{name:<{width}}  {', '.join(file.name for file in files)}: {_summary(files[0])}")
        return 0
    for path, text in _chosen(known, arguments.name, arguments.out).items():
        _write(path, text)
        print(path)
    return 0


def examples() -> dict[str, list[Path]]:
    """Return the names of all examples and the files of each, which differ in the suffix, or in ``_`` for ``-``."""
    package = Path(__file__).parents[1]
    found: dict[str, list[Path]] = {}
    for folder in _FOLDERS:
        for path in sorted((package / folder).iterdir()):
            if path.is_file() and path.suffix in (".toml", ".py", ".sbatch") and path.name != "__init__.py":
                found.setdefault(_key(path.name), []).append(path)
    return dict(sorted(found.items()))


def _key(name: str) -> str:
    return Path(name).stem.replace("_", "-")


def _summary(path: Path) -> str:
    """Return the first sentence, or line, of what a file says of itself."""
    lines = [line.strip('#"! ') for line in path.read_text(encoding="utf-8").splitlines()[:4]]
    text = " ".join(line for line in lines if not line.startswith("/bin/"))
    return text.partition(". ")[0].partition("  ")[0].rstrip(".:")


def _chosen(known: dict[str, list[Path]], name: str, folder: Path) -> dict[Path, str]:
    """Return the texts to be written, for the directory that they will be in."""
    from dbmpi.errors import UserError, suggestion

    if _key(name) not in known:
        raise UserError(f"example {name}: there is none of this name; {suggestion(_key(name), known)}")
    if not folder.is_dir():
        raise UserError(f"--out {folder}: no such directory")
    files = {folder / file.name: _moved(file.read_text(encoding="utf-8")) for file in known[_key(name)]}
    for path in files:
        if path.exists() or path.is_symlink():
            raise UserError(f"{path}: exists and is not overwritten; give --out another directory, or move it away")
    return files


def _moved(text: str) -> str:
    """Return the text of an example for a directory of a user's, in which ``data`` is below and not beside it."""
    return text.replace('"../data/', '"data/').replace(" examples/", " ")


def _write(path: Path, text: str) -> None:
    from dbmpi.errors import UserError

    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
