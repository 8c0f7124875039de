"""Hosts in a user's options for mpirun."""

from __future__ import annotations

from pathlib import Path

import pytest

from dbmpi.errors import UserError
from dbmpi.machine.hosts import Hosts, answering, named


def hosts_of(*options: str) -> Hosts:
    found = named(options)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("options", "names", "slots", "without_b"),
    [
        (["--host", "a:2,b:4"], ["a", "b"], [2, 4], ["--host", "a:2"]),
        (["--host=a,b,c", "--map-by", "node"], ["a", "b", "c"], [1, 1, 1], ["--map-by", "node", "--host", "a,c"]),
        (["-H", "a,b,a"], ["a", "b", "a"], [1, 1, 1], ["-H", "a,a"]),
        (["-ppn", "1", "-hosts", "a,b"], ["a", "b"], [1, 1], ["-ppn", "1", "-hosts", "a"]),
    ],
)
def test_lists_of_hosts(
    tmp_path: Path, options: list[str], names: list[str], slots: list[int], without_b: list[str]
) -> None:
    found = hosts_of(*options)
    assert [host.name for host in found.hosts] == names
    assert [host.slots for host in found.hosts] == slots
    assert found.only({*names} - {"b"}, tmp_path / "unused") == without_b
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize("option", ["--hostfile", "-f", "--machinefile"])
def test_files_of_hosts(tmp_path: Path, option: str) -> None:
    """Open MPI's, and hydra's."""
    given, left = tmp_path / "hosts", tmp_path / "left"
    given.write_text("# ours\na slots=2 max_slots=3\n\nb:4  # the large one\nc\n")
    found = hosts_of("-x", "Y", option, str(given))
    assert [(host.name, host.slots) for host in found.hosts] == [("a", 2), ("b", 4), ("c", 1)]
    assert found.only({"a", "c"}, left) == ["-x", "Y", option, str(left)]
    assert left.read_text() == "a slots=2 max_slots=3\nc\n"


@pytest.mark.parametrize("options", [[], ["--map-by", "node"], ["--host", "a", "--hostfile", "x"], ["--host", ","]])
def test_hosts_that_are_not_known(options: list[str]) -> None:
    assert named(options) is None


def test_a_file_that_is_not_there_is_the_users_to_fix(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hosts: cannot be read"):
        named(["--hostfile", str(tmp_path / "hosts")])


@pytest.mark.parametrize(
    ("given", "ranks", "alive", "left"),
    [
        ("a:2,b:2,c:2", 6, {"a", "c"}, 4),
        ("a,b,c", 6, {"a", "c"}, 4),
        ("a:2,b:4", 5, {"a"}, 1),
        ("a:1,b:9", 3, {"a"}, 1),
        ("a:2,b:2", 4, {"a", "b"}, 4),
    ],
)
def test_hosts_that_are_left_take_their_part_of_the_ranks(given: str, ranks: int, alive: set[str], left: int) -> None:
    assert hosts_of("--host", given).ranks(ranks, alive) == left


def test_hosts_that_answer() -> None:
    found = hosts_of("--host", "a,b,a,c")
    asked: list[str] = []

    def answers(name: str) -> bool:
        asked.append(name)
        return name != "b"

    assert answering(found, answers) == {"a", "c"}
    assert sorted(asked) == ["a", "b", "b", "c"], "a slow one is asked twice"
    assert answering(found, lambda name: False) == {"a", "b", "c"}, "then it is the question that is wrong"
