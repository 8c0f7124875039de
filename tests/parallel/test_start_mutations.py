"""Wrong and unusual descriptions: each ends in a sentence or in a run, and none takes the memory or hangs.

``DBMPI_TEST_STARTS`` is the number of descriptions, ``DBMPI_TEST_SEED`` begins their numbers; ``make test-starts``.
"""

from __future__ import annotations

import faulthandler
import os
import resource
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from harness.environment import timeout_scale
from parallel import start_mutations

from dbmpi.config.reading import read
from dbmpi.errors import RunFailed, UserError
from dbmpi.machine import signals
from dbmpi.runs.training import train

COUNT = int(os.environ.get("DBMPI_TEST_STARTS", "40"))
SEED = int(os.environ.get("DBMPI_TEST_SEED", "1"))
SECONDS = 120.0
"""In which each must have ended; one may be the first to compile some kernels."""
SPARE_MIB = 400
"""What all of them together may take beyond the first one."""
STEPS = 3


class Few:
    """Ends a run after some steps, however many epochs it has."""

    def __init__(self) -> None:
        self.steps = 0

    def on_step(self, event: object) -> bool:
        self.steps += 1
        return self.steps >= STEPS


def outcome(path: Path, comm) -> str:
    """Train, and return how that has ended: ``valid``, or the sentence by which it was refused or has failed."""
    try:
        run = read(path)
        if run.data.train is None:
            return "refused: data.train is missing"  # as the command says
        with signals.StopSignal() as stop:
            train(run, comm, stop, callbacks=Few())
    except UserError as error:
        return f"refused: {error}"
    except RunFailed as error:
        return f"failed: {error}"
    return "valid"


@pytest.mark.parallel([1], timeout=120 + COUNT)
def test_wrong_descriptions_end_in_a_sentence_or_a_run(comm, place, monkeypatch) -> None:
    here = place / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    path = place / "run.toml"
    path.write_text(start_mutations.toml(start_mutations.base(place, np.random.default_rng(0))))
    assert outcome(path, comm) == "valid"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ends: Counter[str] = Counter()
    for number in range(SEED, SEED + COUNT):
        text, told = start_mutations.mutated(place, np.random.default_rng(number))
        path.write_text(text, encoding="utf-8")
        shutil.rmtree(place / "run", ignore_errors=True)
        faulthandler.dump_traceback_later(SECONDS * timeout_scale(), exit=True)
        try:
            end = outcome(path, comm)
        except BaseException as error:
            raise AssertionError(f"description {number} ({told}) ends in {error!r}\n{text}") from error
        finally:
            faulthandler.cancel_dump_traceback_later()
        kind, _, message = end.partition(": ")
        ends[kind] += 1
        assert kind == "valid" or len(message) > 20, (number, told, end)
        assert len(message) < 5000, (number, told, end)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < SPARE_MIB * 1024, (number, told, f"{grown / 1024:.0f} MiB")
    print(dict(ends))
    assert ends["refused"] > COUNT // 4
    assert ends["valid"] > COUNT // 20
    assert sum(ends.values()) == COUNT
