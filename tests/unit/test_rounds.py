"""Rounds: which replicas learn together, what shards make of their pushes, and settings that do not go together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbmpi.config import Run
from dbmpi.data.stream import Stream
from dbmpi.downpour.rounds import Rounds
from dbmpi.errors import UserError
from dbmpi.paramserver.protocol import LAST, MORE, Header
from dbmpi.paramserver.round_server import PushRound


class Replicas:
    """Replicas and one shard in a world without time, in which anything that can happen next may."""

    def __init__(self, stream: Stream, per_epoch: int, learning: int, spares: int, spared: int, steps: int = 1) -> None:
        self.per_epoch, self.spared, self.stream = per_epoch, spared, stream
        self.living = list(range(learning + spares))
        self.rounds = Rounds(stream, per_epoch, learning, spared, steps, self.begin)
        self.numbers = dict.fromkeys(self.living, 0)
        self.learned = [0] * len(self.living)
        self.computing: dict[int, tuple[int, int]] = {}
        self.waiting: dict[int, tuple[int, int]] = {}
        self.finished: set[int] = set()
        self.round, self.needed, self.came = 1, -1, list[tuple[int, int]]()
        self.applied: list[list[int]] = []
        self.dropped: list[int] = []
        self.chain = -1

    def begin(self, replica, number, round, needed, after, position, count):
        assert number == self.numbers[replica]
        if not count:
            self.finished.add(replica)
            return
        if round > self.round:  # all that took part in the last one have died
            assert self.needed - 1 <= 0 or not self.came or round == self.round + 1
            self.round, self.needed, self.came = round, -1, []
        assert after == -1 or (not self.spared and after in self.computing)
        self.computing[replica] = (round, position)

    def options(self):
        asking = [r for r in self.living if r not in self.computing | self.waiting and r not in self.finished]
        return [*(("ask", r) for r in asking if not self.asks(r)), *(("push", r) for r in self.computing)]

    def asks(self, replica):
        return replica in self.rounds._asking

    def act(self, what, replica):
        if what == "ask":
            self.numbers[replica] += 1
            self.rounds.ask(replica, self.numbers[replica])
        else:
            number, position = self.computing.pop(replica)
            self.learned[replica] += 1
            if number < self.round:
                self.dropped.append(position)
                self.rounds.over(replica)
            else:
                self.waiting[replica] = number, position
                self.came.append((replica, position))
                self.close(self.rounds._needed)
        self.rounds.begin_with([replica for replica in self.living if replica not in self.finished])

    def close(self, needed):
        if len(self.came) >= needed:
            self.applied.append(sorted(position for _, position in self.came))
            self.round += 1
            for replica, _ in self.came:
                if replica in self.living:
                    del self.waiting[replica]
                    self.rounds.over(replica)
            self.came = []

    def die(self, replica):
        self.living.remove(replica)
        self.rounds.lose(replica)
        number, less = self.rounds.leave(replica)
        lost = self.computing.pop(replica, None)
        self.waiting.pop(replica, None)
        late = lost is not None and lost[0] < self.round
        returned = self.rounds.give_up(replica, self.learned[replica], self.living)
        ended = bool(self.finished)
        assert returned == (lost is not None and not ended)
        if late and ended:
            self.dropped.append(lost[1])
        if less and number == self.round and self.came and (replica, lost) not in self.came:
            self.close(self.rounds._needed)
        self.rounds.begin_with([replica for replica in self.living if replica not in self.finished])

    def check(self):
        left = self.rounds.left(self.learned)
        known = {position for batches in self.applied for position in batches} | set(self.dropped)
        items = {left.item(position) for position in range(len(left))}
        everything = {self.stream.item(position) for position in range(len(self.stream))}
        assert everything - items <= {self.stream.item(position) for position in known}


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_each_batch_is_learned_once_whoever_is_slow_or_dies(data):
    learning, spares = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 2))
    spared = data.draw(st.integers(0, learning - 1))
    total, per_epoch = data.draw(st.integers(0, 30)), data.draw(st.integers(1, 9))
    holes = tuple(sorted(data.draw(st.sets(st.integers(0, total - 1), max_size=4)))) if total else ()
    frontier = data.draw(st.integers(holes[-1] + 1 if holes else 0, total))
    stream = Stream(total, frontier, holes)
    world = Replicas(stream, per_epoch, learning, spares, spared)
    deaths = data.draw(st.integers(0, learning + spares - 1))
    while options := world.options():
        if deaths and len(world.living) > 1 and data.draw(st.integers(0, 9)) == 0:
            deaths -= 1
            world.die(data.draw(st.sampled_from(world.living)))
        else:
            world.act(*data.draw(st.sampled_from(options)))
        world.check()
    assert not world.waiting
    assert set(world.living) <= world.finished
    done = [position for batches in world.applied for position in batches] + world.dropped
    assert sorted(done) == list(range(len(stream)))
    assert not len(world.rounds.left(world.learned))
    for batches in world.applied:
        assert len({stream.item(position) // per_epoch for position in batches}) == 1 or spared


@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 9))
def test_without_deaths_a_round_has_the_next_batches_of_an_epoch(learning, total, per_epoch):
    world = Replicas(Stream(total), per_epoch, learning, 0, 0)
    while options := world.options():
        world.act(*options[0])
    expected = []
    for epoch in range(0, total, per_epoch):
        batches = list(range(epoch, min(epoch + per_epoch, total)))
        expected += [batches[first : first + learning] for first in range(0, len(batches), learning)]
    assert world.applied == expected
    assert not world.dropped


@given(st.data())
def test_each_element_is_averaged_over_the_samples_that_came(data):
    """Also where clients have died, or were late, in the middle of a push."""
    size = data.draw(st.integers(1, 40))
    order = data.draw(st.permutations([slice(0, size // 3), slice(size // 3, size // 2), slice(size // 2, size)]))
    current, behind = PushRound(1), np.zeros(size, int)
    for client in range(data.draw(st.integers(1, 4))):
        samples, rest = data.draw(st.integers(1, 9)), data.draw(st.integers(0, size))
        part = current.part(client, Header(0, 0, MORE, 0, samples, needed=1))
        for covered in order:
            start = covered.start
            while start < covered.stop and rest:
                stop = min(start + data.draw(st.integers(1, size)), covered.stop, start + rest)
                part.covered.append(slice(start, stop))
                part.done += stop - start
                behind[start:stop] += samples
                rest -= stop - start
                start = stop
    found = np.zeros(size, int)
    for covered, count in current.pieces():
        assert not found[covered].any()
        found[covered] = count
    np.testing.assert_array_equal(found, behind)


def test_a_round_is_full_when_all_have_come_that_will():
    current = PushRound(3)
    assert not current.full
    current.part(0, Header(0, 4, LAST, 0, 1, needed=2)).complete = True
    current.part(1, Header(0, 4, MORE, 0, 1, needed=2))
    assert not current.full
    current.missing = 1
    assert current.full


@settings(deadline=None)
@given(st.data())
def test_walks_of_a_round_are_the_next_batches_in_equal_lengths(data):
    learning, steps, total = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9)), data.draw(st.integers(1, 60))
    dealt: dict[int, list[range]] = {}
    wanted: dict[int, int] = {}

    def begin(replica, number, round, needed, after, position, count):
        if count:
            dealt.setdefault(round, []).append(range(position, position + count))
            wanted[round] = needed

    rounds, position = Rounds(Stream(total), total, learning, 0, steps, begin), 0
    for number in range(1, total + 2):
        for replica in range(learning):
            rounds.over(replica)
            rounds.ask(replica, number)
        rounds.begin_with(range(learning))
        walks, left = dealt.get(number, []), total - position
        assert sum(map(len, walks)) == min(left, learning * steps)
        assert wanted.get(number, 0) == len(walks)
        for walk in walks:
            assert walk.start == position
            assert len(walk) == min(steps, -(-left // learning)) or walk.stop == total
            position = walk.stop
    assert position == total


def test_walks_that_were_begun_are_left_and_those_of_the_dead_are_dealt_again():
    dealt = []
    rounds = Rounds(Stream(10), 10, 2, 0, 3, lambda *turn: dealt.append(turn))
    for replica in (0, 1):
        rounds.ask(replica, 1)
    rounds.begin_with([0, 1])
    assert [turn[-2:] for turn in dealt] == [(0, 3), (3, 3)]
    assert len(rounds.left([0, 0])) == 10
    rounds.lose(1)
    assert rounds.leave(1) == (1, 1)
    assert rounds.give_up(1, 0, [0]) == 3
    rounds.over(0)
    assert rounds.left([3, 0]) == Stream(10, 6, (3, 4, 5))
    rounds.ask(0, 2)
    rounds.begin_with([0])
    assert dealt[-1] == (0, 2, 2, 1, -1, 3, 3)


def test_the_shards_rule_is_by_default_that_of_the_paper_of_each_exchange():
    found = {}
    for exchange in ("asynchronous", "synchronous", "backup", "local", "easgd"):
        section = Run(optimizer={"exchange": exchange}).optimizer
        found[exchange] = section.rule, section.learning_rate, section.nesterov
    usual = ("adagrad", 0.01, False)
    assert found == {
        "asynchronous": usual,
        "synchronous": usual,
        "backup": usual,
        "local": ("momentum", 0.7, True),
        "easgd": ("sgd", 1.0, False),
    }


ROUNDS = {"exchange": "synchronous"}
BACKUP = {"exchange": "backup"}
LOCAL = {"exchange": "local"}
REFUSED = [
    ({"backups": 2}, {}, {}, r'backups = 2 goes with optimizer\.exchange = "backup", not with "asynchronous"'),
    (ROUNDS | {"method": "sandblaster"}, {}, {}, r'exchange = "synchronous" is for Downpour: leave it out'),
    (ROUNDS | {"n_push": 3}, {}, {}, r"set optimizer\.n_push = 1, not 3, optimizer\.n_fetch = 1, not 1,"),
    (BACKUP | {"local_rate": 0.5}, {}, {}, r"optimizer\.local_rate = 0, not 0\.5"),
    (ROUNDS | {"warmstart": 9}, {}, {}, r"leave optimizer\.warmstart, warmstart_samples and warmstart_loss out"),
    (ROUNDS, {"max_staleness": 2}, {}, r"leave server\.max_staleness = 2 out"),
    (ROUNDS | {"staleness_rate": "inverse"}, {}, {}, r'leave optimizer\.staleness_rate = "inverse" out'),
    (BACKUP | {"delay_compensation": "constant"}, {}, {}, r"leave optimizer\.delay_compensation"),
    (ROUNDS, {"overlap": "threads"}, {}, r'set server\.overlap to "none"'),
    (BACKUP, {"fetch": "shared"}, {}, r'set server\.fetch = "copied", or optimizer\.exchange = "synchronous"'),
    (ROUNDS, {"wire": "bfloat16"}, {}, r'"float32", or optimizer\.exchange = "asynchronous"'),
    (LOCAL, {"wire": "bfloat16"}, {}, r'"float32", or local\.pushes = "asynchronous"'),
    (LOCAL | {"n_push": 9}, {}, {}, r"optimizer\.local_rate = 0, not 0, and local\.steps as the number of steps"),
    (LOCAL, {"fetch": "shared"}, {}, r'set server\.fetch = "copied", not "shared", and server\.gradients = "whole"'),
    (LOCAL, {"gradients": "layers"}, {}, r'server\.gradients = "whole", not "layers"'),
    (LOCAL, {"overlap": "threads"}, {}, r'set server\.overlap to "none"'),
    (LOCAL | {"weight_decay": 0.5}, {}, {}, r"set local\.weight_decay instead of optimizer\.weight_decay = 0\.5"),
    (LOCAL | {"warmstart": 9}, {}, {}, r"leave optimizer\.warmstart, warmstart_samples and warmstart_loss out"),
    (LOCAL | {"delay_compensation": "adaptive"}, {}, {}, r"cannot be compensated as gradients"),
    ({"exchange": "easgd", "rule": "adagrad"}, {}, {}, r'leave optimizer\.rule = "adagrad" and'),
    ({"exchange": "easgd", "learning_rate": 0.5}, {}, {}, r"set local\.elasticity and local\.learning_rate"),
    ({"exchange": "easgd", "n_fetch": 4}, {}, {}, r"and local\.steps as the number of steps"),
    ({"momentum_every": 2}, {}, {}, r"momentum_every = 2 needs optimizer\.nesterov = true"),
    (
        {"rule": "momentum", "nesterov": True, "momentum_every": 2, "weight_decay": 0.5},
        {},
        {},
        r"set optimizer\.weight_decay = 0, not 0\.5",
    ),
    (BACKUP | {"backups": 4}, {}, {"replicas": 4}, r"at most 3, or topology\.replicas to at least 5"),
    (BACKUP | {"backups": 3}, {}, {"replicas": 4, "spares": 1}, r"of 3 replicas leaves none"),
]


@pytest.mark.parametrize(("optimizer", "server", "topology", "message"), REFUSED)
def test_settings_that_do_not_go_together_are_refused_with_what_would(optimizer, server, topology, message):
    with pytest.raises(UserError, match=message):
        Run(optimizer=optimizer, server=server, topology=topology)
