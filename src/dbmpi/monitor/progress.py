"""Progress of a run: a live bar on a terminal, and a line every few seconds elsewhere.

The stream of a rank says nothing about that of its launcher: it is a pipe where the launcher writes to a terminal, and
Open MPI gives its ranks a terminal of their own even where the launcher writes to a file.  A launcher that does write
to a terminal sets ``DBMPI_PROGRESS=bar`` and ``COLUMNS``, and the bar is drawn through the pipe.
"""

from __future__ import annotations

import errno
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, TextIO

from dbmpi.monitor.display import Bar, DisplayState, digits, line

if TYPE_CHECKING:
    from rich.live import Live

Mode = Literal["auto", "bar", "lines", "none"]

_LINE_SECONDS = 5.0
_DRAW_SECONDS = 0.1


class RunProgress:
    """Shows the progress of one run; a context manager that ends in :meth:`finish`.

    It never disturbs the run: when the terminal or the pipe is gone, it becomes silent.

    Parameters
    ----------
    total_samples
        Training samples that the whole run is to learn from, all epochs and replicas together.
    mode
        ``bar``, ``lines``, ``none`` (silent), or ``auto``: the value of ``DBMPI_PROGRESS``, or else a bar on a terminal
        without a launcher, and lines elsewhere.
    stream
        Where to write; by default standard output.
    epochs
        Passes through the training samples that make up `total_samples`, to be shown if given.
    """

    def __init__(
        self, total_samples: int, mode: Mode = "auto", stream: TextIO | None = None, *, epochs: float | None = None
    ) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._mode = _choose(mode, self._stream)
        self._state = DisplayState(total_samples, epochs)
        self._live: Live | None = None
        self._shown_at = -math.inf
        self._shown = self._state
        self._started = time.monotonic()

    @property
    def mode(self) -> Mode:
        """How progress is shown: ``bar``, ``lines`` or ``none``."""
        return self._mode

    def update(
        self,
        samples: int,
        loss: float,
        accuracy: float | None,
        samples_per_second: float,
        staleness_mean: float | None,
    ) -> None:
        """Show the present state, unless the last one was shown a moment ago; cheap enough for every poll.

        Parameters
        ----------
        samples
            Training samples learned from so far, those of earlier sessions included.
        loss, accuracy
            Recent means; `accuracy` from 0 to 1, or None or NaN where the loss knows no classes.
        samples_per_second
            All replicas together.
        staleness_mean
            Mean staleness of recent pushes; None or NaN if there were none.
        """
        if self._mode == "none":
            return
        now = time.monotonic()
        self._state = replace(
            self._state,
            samples=samples,
            loss=loss,
            accuracy=_known(accuracy),
            rate=samples_per_second,
            staleness=_known(staleness_mean),
            elapsed=now - self._started,
        )
        if now - self._shown_at >= (_DRAW_SECONDS if self._mode == "bar" else _LINE_SECONDS):
            self._shown_at = now
            self._show()

    def message(self, text: str) -> None:
        """Print a line, above the bar if there is one; nothing in the mode ``none``.

        Parameters
        ----------
        text
            The line, without its end.
        """
        if self._mode == "none":
            return
        with self._if_heard():
            text = _encodable(text, self._stream)
            if self._live is None:
                self._stream.write(text + "\n")
                self._stream.flush()
            else:
                from rich.text import Text

                self._live.console.print(Text(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a warning as :meth:`message` does; in the mode ``none`` on standard error.

        Parameters
        ----------
        text
            The warning, one line.
        """
        if self._mode != "none":
            self.message(f"warning: {text}")
            return
        with suppress(OSError, ValueError):  # the reader is gone
            print(f"dbmpi: warning: {text}", file=sys.stderr, flush=True)

    def evaluation(
        self,
        epoch: float,
        loss: float,
        accuracy: float | None,
        samples: int | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Print the result of an evaluation on held-out samples.

        Parameters
        ----------
        epoch
            Passes through the training samples so far.
        loss, accuracy
            Of the held-out samples; `accuracy` from 0 to 1, or None where the loss knows no classes.
        samples
            Number of held-out samples, to be shown if given.
        metrics
            Further means over them, by name.
        """
        parts = [f"epoch {epoch:.4g}", f"test loss {digits(loss)}"]
        if (accuracy := _known(accuracy)) is not None:
            parts.append(f"test accuracy {100 * accuracy:.2f} %")
        parts += [f"{name} {digits(mean)}" for name, mean in (metrics or {}).items()]
        if samples is not None:
            parts.append(f"{samples:,} samples")
        self.message("   ".join(parts))
        if not math.isfinite(loss):
            self.message("warning: some outputs for the test data are NaN or infinite; such samples count as wrong")

    def finish(self) -> None:
        """Show the last state, and leave it on the terminal; a second call does nothing."""
        if self._mode != "none" and self._shown is not self._state:
            self._show()
        if self._live is not None:
            with self._if_heard():
                self._live.stop()
        self._live, self._mode = None, "none"

    def __enter__(self) -> RunProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.finish()

    def _show(self) -> None:
        self._shown = self._state
        if self._mode == "lines":
            self.message(line(self._state))
            return
        with self._if_heard():
            if self._live is None:
                self._live = _open_live(self._stream, lambda: self._state)
            self._live.refresh()

    @contextmanager
    def _if_heard(self) -> Iterator[None]:
        """Become silent when the reader is gone."""
        try:
            yield
        except OSError as error:
            self._live, self._mode = None, "none"
            if error.errno in (errno.EPIPE, errno.EIO):
                discard(self._stream)
        except ValueError:
            if not getattr(self._stream, "closed", False):
                raise
            self._live, self._mode = None, "none"


def discard(stream: TextIO) -> None:
    """Discard what is still in the buffer of a dead pipe, so that Python does not fail on it when it ends.

    Parameters
    ----------
    stream
        It leads to ``/dev/null`` from now on, if it is a file of the system.
    """
    with suppress(OSError, ValueError):
        descriptor = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


def _choose(mode: Mode, stream: TextIO | None) -> Mode:
    """Return the mode that ``auto`` stands for, and what is possible on this stream."""
    if stream is None or getattr(stream, "closed", False):
        return "none"
    wish = os.environ.get("DBMPI_PROGRESS", "")
    if mode == "auto" and wish in ("bar", "lines", "none"):
        mode = wish  # type: ignore[assignment]
    if mode == "auto":
        launched = any(name in os.environ for name in ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK"))
        mode = "bar" if stream.isatty() and not launched else "lines"
    if mode == "bar" and os.environ.get("TERM", "").lower() in ("dumb", "unknown"):
        mode = "lines"
    return mode


def _open_live(stream: TextIO, state: Callable[[], DisplayState]) -> Live:
    """Start a live display of the bar; without a thread, for it is drawn from the updates."""
    from rich.console import Console
    from rich.live import Live

    class Terminal(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError(errno.EPIPE, "the reader of the progress is gone")

        def show_cursor(self, show: bool = True) -> bool:
            # A run may be killed at any time, and would leave a terminal without a cursor behind.
            return False

    terminal = Terminal(file=stream, force_terminal=True, legacy_windows=False)
    live = Live(
        Bar(state),  # type: ignore[arg-type]
        console=terminal,
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    live.start()
    return live


def _known(value: float | None) -> float | None:
    """Return the value, or None for one that says nothing."""
    return value if value is not None and math.isfinite(value) else None


def _encodable(text: str, stream: TextIO) -> str:
    """Return the text with what the stream cannot encode replaced by question marks."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
