"""Pushes of a replica that has died or does not pause: whole on all shards, or not there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmpi.downpour.final_test import FinalTest
from dbmpi.downpour.settlement import HeldReplicas, Settled, Settlement
from dbmpi.mpi.mailbox import MessageKind
from dbmpi.objective import Outcome
from dbmpi.paramserver.protocol import LAST, MORE, REPORT
from dbmpi.paramserver.tally import PushProgress


class Chunks:
    """A server of which only the kinds of chunks count: for each client, those posted, and how many are applied."""

    def __init__(self, posted: list[list[int]], applied: list[int]) -> None:
        self.posted, self.applied, self.held = posted, applied, set[int]()

    def hold(self, client: int) -> None:
        self.held.add(client)

    def let_go(self, client: int) -> None:
        self.held.discard(client)

    def count(self, client: int, kind: int, stop: int | None = None) -> int:
        return self.posted[client][:stop].count(kind)

    def progress(self, client: int) -> PushProgress:
        def begun(stop: int | None) -> int:
            kinds = [kind for kind in self.posted[client][:stop] if kind != REPORT]
            return kinds.count(LAST) + bool(kinds and kinds[-1] == MORE)

        return PushProgress(self.count(client, LAST), begun(None), begun(self.applied[client]))

    def reports(self, client: int) -> int:
        return self.count(client, REPORT)

    def settle(self, client: int, pushes: int, *, gone: bool) -> bool:
        while self.applied[client] < len(self.posted[client]):
            kind = self.posted[client][self.applied[client]]
            if self.count(client, REPORT if kind == REPORT else LAST, self.applied[client]) >= pushes:
                break
            self.applied[client] += 1
        return True


@st.composite
def _shards(draw):
    """One replica of some partitions, and for each shard what has arrived there of pushes of several chunks."""
    partitions, shards, servers, pushing = draw(st.integers(1, 2)), draw(st.integers(1, 3)), [], []
    for shard in range(shards):
        takes = [number for number in range(partitions) if draw(st.booleans())]
        posted, applied = [], []
        for partition in range(partitions):
            whole = [*[MORE] * draw(st.integers(0, 2)), LAST] if partition in takes else []
            push = whole + ([REPORT] if shard == partition == 0 else [])
            way = push * 4
            posted.append(way[: draw(st.integers(0, len(way)))])
            applied.append(draw(st.integers(0, len(posted[-1]))))
        servers.append(Chunks(posted, applied))
        pushing.append(takes)
    return partitions, servers, pushing


@given(_shards())
def test_all_shards_apply_the_same_pushes_and_as_many_as_have_arrived_everywhere(case):
    partitions, servers, pushing = case
    sides = [
        HeldReplicas(server, partitions, takes, lead=shard == 0)
        for shard, (server, takes) in enumerate(zip(servers, pushing, strict=True))
    ]
    before = [list(server.applied) for server in servers]
    waiting: list[tuple[int, PushProgress]] = []

    def tell(kind: MessageKind, replica: int, *values: int) -> None:
        for shard, side in enumerate(sides[1:], 1):
            if kind == MessageKind.HOLD:
                waiting.append((shard, side.hold(replica)))
            else:
                side.settle(replica, values[0], gone=bool(values[1]))

    settlement = Settlement(len(sides), sides[0], tell, lambda replica: (0, 0))
    settlement.begin(0, gone=True)
    for _, progress in reversed(waiting):  # answers may come in any order
        assert settlement.busy
        settlement.answered(0, progress, gone=True)
    [done] = settlement.take()
    assert not settlement.busy
    whole = [servers[0].reports(0)]
    partly = 0
    for shard, server in enumerate(servers):
        for partition in pushing[shard]:
            whole.append(server.count(partition, LAST))
    assert done == Settled(0, True, min(whole), done.dropped, done.partly)
    for shard, server in enumerate(servers):
        assert server.held == set(range(partitions))
        for partition in pushing[shard]:
            now, was = server.applied[partition], before[shard][partition]
            ended = server.count(partition, LAST, now)
            # Just the pushes that count, and nothing that had not been applied before.
            assert ended == done.pushes or (ended > done.pushes and now == was)
            assert server.posted[partition][:now][-1:] != [MORE] or now == was
            kinds = [kind for kind in server.posted[partition][:now] if kind != REPORT]
            partly = max(partly, kinds.count(LAST) + (kinds[-1:] == [MORE]) - done.pushes)
    assert done.partly == partly <= done.dropped


def test_parts_of_a_lost_replica_are_evaluated_by_others():
    asked: list[tuple[int, int, int]] = []
    test = FinalTest([0, 2, 3], lambda *words: asked.append(words))
    assert asked == [(0, 0, 3), (2, 1, 3), (3, 2, 3)]
    test.add(0, Outcome(5, 1.0, 4))
    test.lose(2, [0, 3])
    assert asked[3:] == [(0, 1, 3)]
    test.add(2, Outcome(4, 2.0, 3))
    assert test.awaited == [0]
    assert test.outcome is None
    test.add(1, Outcome(5, 0.5, 5))
    test.add(1, Outcome(5, 0.5, 5))  # of the lost one after all
    assert test.outcome == Outcome(14, pytest.approx(3.5), 12)
    assert test.awaited == []
