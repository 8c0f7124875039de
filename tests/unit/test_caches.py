"""Sizes of caches, from the system's descriptions of them."""

import pytest

from dbmpi.machine.caches import Caches, found

INTEL = [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "2048K"), ("3", "Unified", "491520K")]


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        (INTEL, Caches(48 << 10, 2 << 20)),
        ([("1", "Data", "32K"), ("2", "Unified", "1M")], Caches(32 << 10, 1 << 20)),
        ([("1", "Data", "many"), ("2", "Unified", "0K")], Caches()),
        ([("2", "Unified", "512K"), ("1", "Instruction", "64K")], Caches(second=512 << 10)),
        ([], Caches()),
    ],
)
def test_caches(tmp_path, described, expected):
    for number, values in enumerate(described):
        folder = tmp_path / f"index{number}"
        folder.mkdir()
        for name, value in zip(("level", "type", "size"), values, strict=True):
            (folder / name).write_text(value + "\n")
    (tmp_path / "index9").mkdir()  # described by nothing
    assert found(tmp_path) == expected
