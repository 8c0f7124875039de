"""Hosts in a user's options for mpirun: which ones a job has, which still answer, and the options without others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dbmpi.errors import UserError

_LISTS = ("--host", "-host", "-H", "--hosts", "-hosts")
_AT_ONCE = 16
"""Hosts that are asked at a time."""
_FILES = ("--hostfile", "-hostfile", "--machinefile", "-machinefile", "-f")


@dataclass(frozen=True)
class Host:
    """A host as the user has given it."""

    name: str
    slots: int
    """Ranks that it is meant for; 1 if that is not said."""
    text: str
    """What the user wrote: ``name:2``, or a line of a host file."""


@dataclass(frozen=True)
class Hosts:
    """The hosts of a job, and the option that names them."""

    hosts: tuple[Host, ...]
    option: str
    is_file: bool
    others: tuple[str, ...]
    """The user's other options."""

    def only(self, names: Collection[str], file: Path) -> list[str]:
        """Return options for mpirun with these hosts alone.

        Parameters
        ----------
        names
            Of the hosts.
        file
            Where to write a host file, if the user has given one.
        """
        left = [host.text for host in self.hosts if host.name in names]
        if self.is_file:
            file.write_text("".join(f"{line}\n" for line in left))
        return [*self.others, self.option, str(file) if self.is_file else ",".join(left)]

    def ranks(self, before: int, names: Collection[str]) -> int:
        """Return how many of the ranks of a job the hosts of these names take, by their slots; at least one.

        Parameters
        ----------
        before
            Ranks on all hosts.
        names
            Of the hosts.
        """
        slots = sum(host.slots for host in self.hosts if host.name in names)
        return max(1, before * slots // sum(host.slots for host in self.hosts))


def named(options: Sequence[str]) -> Hosts | None:
    """Return the hosts that a user's options for mpirun name; None if they name none, or in more than one way.

    Parameters
    ----------
    options
        Those of Open MPI's mpirun, or of hydra.

    Raises
    ------
    UserError
        If a host file cannot be read.
    """
    words = [part for word in options for part in _apart(word)]
    found = [index for index, word in enumerate(words[:-1]) if word in _LISTS + _FILES]
    if len(found) != 1:
        return None
    option, value = words[found[0] : found[0] + 2]
    others = (*words[: found[0]], *words[found[0] + 2 :])
    if option in _LISTS:
        texts = value.split(",")
    else:
        try:
            texts = [line.partition("#")[0].strip() for line in Path(value).read_text(encoding="utf-8").splitlines()]
        except OSError as error:
            raise UserError(f"--mpi-args {option} {value}: cannot be read: {error.strerror}") from None
    hosts = tuple(_host(text) for text in texts if text)
    return Hosts(hosts, option, option in _FILES, others) if hosts else None


def answering(hosts: Hosts, answers: Callable[[str], bool]) -> set[str]:
    """Return the names of the hosts that answer, the second time at the latest; all names if none does.

    Parameters
    ----------
    hosts
        The hosts.
    answers
        Returns whether a program can be started on the host of that name.
    """
    names = list(dict.fromkeys(host.name for host in hosts.hosts))
    found: set[str] = set()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in range(2):
            asked = [name for name in names if name not in found]
            found |= {name for name, there in zip(asked, pool.map(answers, asked), strict=True) if there}
    return found or set(names)


def _apart(word: str) -> list[str]:
    """Return ``--host=a,b`` as two words, and any other word as it is."""
    option, equals, value = word.partition("=")
    return [option, value] if equals and option in _LISTS + _FILES else [word]


def _host(text: str) -> Host:
    """Read ``name``, ``name:2`` or ``name slots=2``."""
    first, *settings = text.split()
    name, _, number = first.partition(":")
    slots = next((word.partition("=")[2] for word in settings if word.startswith("slots=")), number)
    return Host(name, int(slots) if slots.isdecimal() and int(slots) else 1, text)
