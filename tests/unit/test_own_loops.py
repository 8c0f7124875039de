"""A training script becomes a Downpour job by few changed lines, and the documentation shows which."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

import numpy as np
import pytest

from dbmpi.kernels.checks import copy_finite

PROJECT = Path(__file__).parents[2]


SCRIPTS = {"images": "own-loops.md", "ratings": "examples.md", "text": "examples.md"}
"""Scripts that are converted, and the page that shows how."""


def code(name: str) -> list[str]:
    """Return the lines of an example below the description of the file."""
    return (PROJECT / "examples" / name).read_text(encoding="utf-8").partition('"""\n\n')[2].splitlines()


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_difference_is_small_and_shown(name: str) -> None:
    before, after = code(f"{name}_loop.py"), code(f"{name}_downpour.py")
    lines = list(difflib.unified_diff(before, after, n=1, lineterm=""))[2:]
    for sign in "+-":
        assert 0 < len([line for line in lines if line.startswith(sign) and line.strip("+- ")]) <= 5
    shown = re.findall(r"```diff\n(.*?)```", (PROJECT / "docs" / SCRIPTS[name]).read_text("utf-8"), re.DOTALL)
    assert "".join(f"{line}\n" for line in lines if not line.startswith("@@")) in shown


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [0, 1, 1000, 200_000])
def test_a_copy_notices_what_is_not_finite(dtype: type, size: int) -> None:
    random = np.random.default_rng(size)
    source, target = random.normal(size=size).astype(dtype), np.zeros(size, dtype)
    source[:1], source[1:2] = np.finfo(dtype).max, np.finfo(dtype).smallest_subnormal
    assert copy_finite(target, source)
    assert target.tobytes() == source.tobytes()
    for wrong in (np.nan, np.inf, -np.inf) if size else ():
        spoilt = source.copy()
        spoilt[random.integers(size)] = wrong
        assert not copy_finite(target, spoilt)
