"""The launchers' own long texts after an error message of dbmpi, which `dbmpi launch` leaves out.

Open MPI's mpirun and MPI_Abort write to standard error that a rank has ended with an exit code, which one and why it
may have been; MPICH's mpiexec writes something like it to standard output.  Where dbmpi has explained the error,
they bury its message.  Where it has not, the text is the only explanation, and stays.  A warning of Open MPI that
one-sided operations are "not tested for post-failure operation" never does: see :mod:`dbmpi.mpi.failures`.

Everything else passes at once and byte for byte: only bytes that may be the beginning of such a text are held back, for
a moment.  Launchers treat a pipe and a terminal alike, so that nothing else changes for the ranks.
"""

from __future__ import annotations

import errno
import os
import re
import select
import threading
from collections.abc import Callable

_MOMENT = 0.2
"""Seconds for which the beginning of a text is held back, and for which output is read after the launcher has ended."""
_LONGEST = 4096
"""Bytes that one text may have; anything longer is not one."""
_RULE = b"-" * 74 + b"\n"
_OPEN_MPI = (
    b"MPI_ABORT was invoked on rank ",
    *(
        name + text
        for name in (b"prterun ", b"mpirun ")
        for text in (
            b"detected that one or more processes exited",
            b"noticed that ",
            b"has exited due to process rank ",
        )
    ),
    b"Primary job  terminated normally, but ",
)
_BAD = b"=   BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES\n"
_UNTESTED = b"WARNING: The selected 'osc' module "
_BEGINNINGS = (*(_RULE + words for words in (*_OPEN_MPI, _UNTESTED)), b"=" * 83 + b"\n" + _BAD)

_TAIL = rb"YOUR APPLICATION TERMINATED WITH THE EXIT STRING[^\n]*\nThis typically[^\n]*\nPlease see[^\n]*\n|(?=[^Y])"
"""What follows on that of MPICH where a signal was the reason."""


def _texts(tail: bytes) -> re.Pattern[bytes]:
    return re.compile(
        rb"-{74}\n(?:"
        + b"|".join(map(re.escape, _OPEN_MPI))
        + rb")(?:(?!-{74}\n)[\s\S]){1,%d}-{74}\n" % _LONGEST
        + rb"|={83}\n"
        + re.escape(_BAD)
        + rb"(?:=   [^\n]*\n){1,20}={83}\n(?:"
        + tail
        + rb")|Abort\(\d+\) on node \d+ \(rank \d+ in comm \d+\): application called MPI_Abort\([^\n]{1,80}\n"
        + rb"|\[[\w.-]{1,64}:\d{1,10}\] PMIX ERROR: PMIX_ERR_UNREACH in file [^\n]{1,300}\n"
    )


_WARNING = re.compile(
    _RULE
    + _UNTESTED
    + rb"'\w{1,40}' is not tested for post-failure\n(?:(?!-{74}\n)[\s\S]){1,%d}-{74}\n" % _LONGEST
    + rb"|\d{1,9} more process(?:es have| has) sent help message help-mpi-ft\.txt / module:untested:failundef\n"
)
_TEXT, _LAST_TEXT = _texts(_TAIL), _texts(_TAIL + b"|")
_LINE = re.compile(
    rb"(?<![^\n\r\0])(?:\[(?:[\w.-]{1,64}(?::\d{0,10}(?:\](?: PMIX[^\n]{0,340}|[ PMI]{0,4}))?)?)?"
    rb"|A|Ab|Abo|Abor|Abort(?:\(\d{0,10}(?:\)[^\n]{0,200})?)?)\Z"
)
"""The beginning of a text of one line."""


class Sieve:
    """Takes the output of a launcher in pieces, and gives it back without its texts.

    Parameters
    ----------
    said
        Returns whether dbmpi has explained the error; called when a text has come.
    """

    def __init__(self, said: Callable[[], bool]) -> None:
        self._said = said
        self._held = b""
        self._last = b""

    @property
    def holds(self) -> bool:
        """Whether something is held back, until more comes or :meth:`flush` is called."""
        return bool(self._held)

    def __call__(self, data: bytes) -> bytes:
        """Return what can be passed on, now that `data` has come."""
        data = self._drop(self._held + data, _TEXT)
        start = max(0, _begun(self._last + data) - len(self._last))
        if len(data) - start > 2 * _LONGEST:
            start = len(data)
        self._held = data[start:]
        return self._passed(data[:start])

    def flush(self) -> bytes:
        """Return the bytes held back: nothing that continues them has come."""
        data, self._held = self._held, b""
        return self._passed(self._drop(data, _LAST_TEXT))

    def _passed(self, data: bytes) -> bytes:
        self._last = data[-1:] or self._last
        return data

    def _drop(self, data: bytes, text: re.Pattern[bytes]) -> bytes:
        data = _WARNING.sub(b"", data)
        return text.sub(b"", data) if text.search(data) and self._said() else data


def _begun(data: bytes) -> int:
    """Return where an incomplete text begins; `data` includes the byte before it, if there was one."""
    starts = [len(data)]
    after = max((found.end() for found in _TEXT.finditer(data)), default=0)  # not dropped: dbmpi has said nothing
    for beginning in _BEGINNINGS:
        if (start := data.find(beginning, after)) >= 0:
            starts.append(start)
        longest = min(len(beginning), len(data) - after)
        length = next((n for n in range(longest, 0, -1) if data.endswith(beginning[:n])), 0)
        starts.append(len(data) - length)
    if found := _LINE.search(data, after):
        starts.append(found.start())
    return min(starts)


class Outputs:
    """The standard output and error of a launcher to be started, with its texts sieved out.

    If both lead to the same file, they share a pipe, so that their order stays.

    Parameters
    ----------
    open_mpi
        Whether it is Open MPI's launcher, which has no text for standard output.
    said
        See :class:`Sieve`.

    Attributes
    ----------
    stdout, stderr
        For the launcher; None is this process's own.
    kept
        Files that the launcher keeps open: if this process is killed, it could not end its ranks while it writes to a
        pipe without a reader.
    """

    def __init__(self, open_mpi: bool, said: Callable[[], bool]) -> None:
        self._said = said
        self._ends: dict[int, tuple[int, int]] = {2: os.pipe()}
        self.stderr = self._ends[2][1]
        self.stdout: int | None = None
        if os.path.sameopenfile(1, 2):
            self.stdout = self.stderr
        elif not open_mpi:
            self._ends[1] = os.pipe()
            self.stdout = self._ends[1][1]
        self.kept = tuple(source for source, _ in self._ends.values())
        self._threads: list[threading.Thread] = []
        self._ended = threading.Event()

    def start(self) -> None:
        """Begin to pass on, after the launcher has been started."""
        for target, (source, entrance) in self._ends.items():
            os.close(entrance)
            self._threads.append(threading.Thread(target=self._pass, args=(source, target), daemon=True))
            self._threads[-1].start()

    def finish(self) -> None:
        """Pass on the rest, after the launcher has ended."""
        self._ended.set()
        if not self._threads:
            for ends in self._ends.values():
                for end in ends:
                    os.close(end)
        for thread in self._threads:
            thread.join()
        self._ends.clear()

    def _pass(self, source: int, target: int) -> None:
        sieve = Sieve(self._said)
        try:
            while True:
                if not select.select([source], [], [], _MOMENT)[0]:
                    _write(target, sieve.flush())
                    if self._ended.is_set():
                        return  # a helper of the launcher that lives on may keep the pipe open
                    continue
                data = os.read(source, 1 << 16)
                _write(target, sieve(data) if data else sieve.flush())
                if not data:
                    return
        finally:
            os.close(source)


def _write(target: int, data: bytes) -> None:
    """Write everything; where the reader is gone or the disk full, it is lost, and the job continues."""
    while data:
        try:
            data = data[os.write(target, data) :]
        except BlockingIOError:
            select.select([], [target], [], _MOMENT)
        except OSError as error:
            if error.errno != errno.EINTR:
                return
