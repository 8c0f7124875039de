"""Silence of ranks: counted by the lead, which may have been away itself, and noticed by a rank's own thread."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from dbmpi.config import MonitorSection
from dbmpi.downpour import stalls
from dbmpi.downpour.heartbeat import Heartbeat
from dbmpi.downpour.stalls import Stalls
from dbmpi.errors import RunFailed
from dbmpi.mpi.topology import Plan


class Lead:
    """A lead whose clock is set by hand, on rank 0 with a shard, before two replicas of two partitions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, on_stall: str, seconds: float = 16.0) -> None:
        self.now, self.said, self.lost, self.dead = 100.0, [], [], frozenset[int]()
        monkeypatch.setattr(stalls, "time", SimpleNamespace(monotonic=lambda: self.now))
        plan = Plan(1, 2, 2)
        replicas = SimpleNamespace(
            lost=self.lost,
            standings=[SimpleNamespace(reports=SimpleNamespace(steps=steps)) for steps in (7, 1234)],
            say_alive=lambda: self.said.append("alive"),
        )
        self.stalls = Stalls(
            MonitorSection(stall_timeout=seconds, on_stall=on_stall),
            self,
            plan,
            replicas,
            self.give_up,
            self.said.append,
        )

    def give_up(self, replica: int, why: str) -> None:
        self.lost.append(replica)
        self.said.append(f"without {replica}: {why}")

    def wait(self, seconds: int, *beating: int) -> None:
        """Check every second, while some ranks beat."""
        for _ in range(seconds):
            self.now += 1
            for rank in beating:
                self.stalls.heard(rank)
            self.stalls.check()


def test_a_silent_rank_is_named_once_and_when_it_is_back(monkeypatch):
    lead = Lead(monkeypatch, "warn")
    lead.wait(18, 0, 1, 2, 4)  # a beat and a check may come late
    assert lead.said == []
    lead.wait(100, 0, 1, 2, 4)
    named = "warning: rank 3 (partition 0 of replica 1, after 1,234 steps) has been silent for 16 s"
    assert [text.partition(";")[0] for text in lead.said] == [named]
    lead.wait(15, *range(5))
    assert lead.said[1:] == ["rank 3 (partition 0 of replica 1, after 1,234 steps) is back after 118 s"]
    assert lead.stalls.may_end()
    lead.wait(19, 0, 1, 2, 4)
    assert len(lead.said) == 3


def test_a_lead_that_was_suspended_accuses_no_rank(monkeypatch):
    lead = Lead(monkeypatch, "end")
    lead.wait(4)
    lead.now += 10_000
    lead.stalls.check()
    lead.wait(10)
    with pytest.raises(RunFailed, match=r"stalled: rank 0 \(shard 0\) has been silent for 16 s"):
        lead.wait(1)


def test_ranks_that_have_died_are_not_silent(monkeypatch):
    lead = Lead(monkeypatch, "end")
    lead.dead = frozenset({3})
    lead.wait(100, 0, 1, 2, 4)
    assert lead.said == []


def test_a_replica_is_dropped_once_and_the_end_waits_for_it(monkeypatch):
    lead = Lead(monkeypatch, "drop")
    lead.wait(19, 0, 1, 2)  # both ranks of replica 1 are silent
    assert [text.partition(":")[0] for text in lead.said] == ["without 1"]
    assert not lead.stalls.may_end()
    assert lead.said[1:] == ["alive"]
    lead.wait(1, 0, 1, 2, 3)
    assert not lead.stalls.may_end()
    lead.wait(16, 0, 1, 2, 3)
    assert not lead.stalls.may_end()
    lead.wait(1, 0, 1, 2, 3)
    with pytest.raises(RunFailed, match=r"rank 4 \(partition 1 of replica 1, .* does not come back"):
        lead.stalls.may_end()
    lead.stalls.heard(4)
    assert lead.stalls.may_end()


def test_a_shard_cannot_be_dropped(monkeypatch):
    lead = Lead(monkeypatch, "drop")
    with pytest.raises(RunFailed, match=r"stalled: rank 0 \(shard 0\)"):
        lead.wait(19, 1, 2, 3, 4)


def test_nothing_is_watched_without_a_limit(monkeypatch):
    lead = Lead(monkeypatch, "end", 0.0)
    lead.wait(10_000)
    assert lead.stalls.may_end()


def test_a_rank_writes_its_stack_once_until_it_beats_again(capfd):
    sent = []
    seconds = 0.2
    with Heartbeat(
        seconds, lambda: sent.append(time.monotonic()), "rank 7", lambda: "in step 3 (compute)"
    ) as heartbeat:
        for beats in (True, False, True, False):
            begun = time.monotonic()
            while time.monotonic() - begun < 5 * seconds:
                if beats:
                    heartbeat.beat()
                time.sleep(seconds / 50)
        count = len(sent)
        other = threading.Thread(target=heartbeat.beat)
        other.start()
        other.join()
        assert len(sent) == count  # another thread shows nothing
    written = capfd.readouterr().err
    assert written.count("dbmpi: rank 7 has made no progress for 0.2 s, in step 3 (compute); it is here:\n") >= 2
    assert written.count("in test_a_rank_writes_its_stack_once_until_it_beats_again") >= 2
    assert count >= 8
