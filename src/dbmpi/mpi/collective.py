"""What several ranks open and free together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

from dbmpi.errors import KnownToAll


class Collective(ABC):
    """A context manager whose resources are given back by all ranks together.

    Where an exception of one rank alone ends the block, nothing is freed: that would wait in vain for the others, which
    do not know of it, and the job is about to end.
    """

    @abstractmethod
    def free(self) -> None:
        """Give everything back (collective); a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, KnownToAll):
            self.free()
