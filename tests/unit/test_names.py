"""One word, one meaning: names of public classes, of files, and the homes of constants."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "dbmpi"
FILES = sorted(
    path for path in SOURCE.glob("**/*.py") if path.relative_to(SOURCE).parts[0] not in ("examples", "slurm")
)
NOUNS = {"blocking", "encoding", "meaning", "pooling", "reading", "training", "waiting"}
"""Names of files that end like a gerund and are the field's nouns."""


def repeated(files: list[Path]) -> dict[str, list[str]]:
    """Return the public classes that are defined in several files."""
    homes = defaultdict(list)
    for path in files:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(path.name)
    return {name: places for name, places in homes.items() if len(places) > 1}


def test_each_public_class_has_a_name_of_its_own() -> None:
    assert len(FILES) > 100
    assert repeated(FILES) == {}


def test_a_repeated_name_would_be_found(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text("class Kind:\n    pass\n\n\nclass _Own:\n    pass\n")
    assert repeated(sorted(tmp_path.glob("*.py"))) == {"Kind": ["one.py", "two.py"]}


def test_files_are_named_by_nouns() -> None:
    wrong = {path.stem for path in FILES if re.search(r"(ing|utils?|helpers?|misc|common)$", path.stem)}
    assert wrong - NOUNS == set()
    assert {path.stem for path in FILES} >= NOUNS


def test_tags_are_in_one_register() -> None:
    wrong = [
        f"{path.name}:{number}"
        for path in FILES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.match(r"_?[A-Z_]*TAGS? *=", line)
    ]
    assert wrong == []
