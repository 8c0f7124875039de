"""How a job ended: one table of exit codes, whatever the launcher says."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from dbmpi.errors import DIED
from dbmpi.machine import endings, signals
from dbmpi.machine.endings import documented, note_run, read_note
from dbmpi.machine.signals import HEEDED, SecondSignal, StopSignal

HYDRA, OPEN_MPI = {"bare": True, "unfinished": False}, {"bare": False, "unfinished": False}


@pytest.mark.parametrize("said", [HYDRA, OPEN_MPI], ids=["hydra", "Open MPI"])
def test_what_the_ranks_end_with_stays(said: dict[str, bool]) -> None:
    for code in (0, 1, 2, DIED, *(128 + number for number in HEEDED)):
        assert documented(code, **said) == code


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_a_death_is_one_code_under_each_mpi(number: signal.Signals) -> None:
    assert (
        documented(128 + number, **OPEN_MPI) == documented(number, **HYDRA) == documented(128 + number, **HYDRA) == DIED
    )


def test_hydra_adds_up_what_ranks_died_of_and_what_it_killed_others_by() -> None:
    assert documented(signal.SIGABRT | signal.SIGKILL, **HYDRA) == DIED


def test_codes_of_a_users_own_program_stay() -> None:
    for code in (3, 9, 15, 77, 200, 255):
        assert documented(code, **OPEN_MPI) == code


@pytest.mark.parametrize("code", [0, 255])
def test_a_first_rank_that_was_cut_off_is_a_death(code: int) -> None:
    assert documented(code, bare=False, unfinished=True) == DIED


def test_the_first_rank_leaves_where_its_run_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = tmp_path / "note"
    monkeypatch.setenv(endings.UNFINISHED, str(note))
    note_run(tmp_path / "run")
    assert read_note(note) == (False, None)  # it is on another host, or has ended
    note.touch()
    assert read_note(note) == (True, None)
    note_run(tmp_path / "run")
    assert read_note(note) == (True, tmp_path / "run")


@pytest.mark.parametrize("number", HEEDED)
def test_all_signals_that_ask_for_the_end_are_noted(number: signal.Signals) -> None:
    inherited = signal.signal(number, signal.SIG_DFL)  # nohup lets a program ignore SIGHUP
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), number)
            assert stop.number == number
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, inherited)


def test_a_second_signal_is_final_but_not_one_that_comes_with_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGUSR2)
        now += 0.9
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGUSR2
        now += 0.2
        with pytest.raises(SecondSignal) as caught:
            os.kill(os.getpid(), signal.SIGUSR1)
        assert caught.value.number == signal.SIGUSR1
        assert stop.number == signal.SIGUSR2


def test_what_another_rank_has_got_counts_as_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    with StopSignal() as stop:
        stop.hear(0)  # a callback has asked for the end
        assert stop.number == 0
        stop.hear(signal.SIGTERM)
        now += 1.1
        with pytest.raises(SecondSignal):
            os.kill(os.getpid(), signal.SIGTERM)


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.number == 0
    finally:
        signal.signal(signal.SIGHUP, before)
