"""What is done about staleness: turns, compensation, rates, and settings that do not go together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.rule_twins import RuleTwin

from dbmpi.config import OptimizerSection, Run, ServerSection
from dbmpi.config.optimizer import RULES
from dbmpi.downpour.turns import Turns, most_overlaps
from dbmpi.errors import UserError
from dbmpi.kernels import updates
from dbmpi.paramserver import compensation
from dbmpi.paramserver.rules import rule
from dbmpi.paramserver.schedule import Moment

DTYPES = [np.float32, np.float64]


class Replicas:
    """Replicas that ask for turns and end them in any order; each turn is an interval on a clock of events."""

    def __init__(self, number: int, most: int, shards: int) -> None:
        self.turns = Turns(most, shards, self.begin)
        self.asked: dict[int, int] = {}
        self.going_on: dict[int, int] = {}
        self.intervals: list[tuple[int, int]] = []
        self.clock, self.number = 0, number

    def begin(self, replica: int, number: int) -> None:
        assert self.asked.pop(replica) == number
        self.clock += 1
        self.going_on[replica] = self.clock

    def end(self, replica: int) -> None:
        self.clock += 1
        self.intervals.append((self.going_on.pop(replica), self.clock))

    def overlaps(self) -> list[int]:
        """Return for each turn with how many others it overlaps."""
        every = [*self.intervals, *((begin, self.clock + 1) for begin in self.going_on.values())]
        return [sum(a < d and c < b for c, d in every) - 1 for a, b in every]


@settings(max_examples=200)
@given(data=st.data(), number=st.integers(1, 7), most=st.integers(0, 12), shards=st.integers(1, 3))
def test_no_turn_overlaps_with_more_than_allowed_and_nobody_waits_for_ever(data, number, most, shards):
    world = Replicas(number, most, shards)
    lost: set[int] = set()
    for step in range(data.draw(st.integers(1, 60))):
        replica = data.draw(st.integers(0, number - 1))
        if replica in lost:
            continue
        if data.draw(st.integers(0, 19)) == 0 and len(lost) < number - 1:
            lost.add(replica)
            world.asked.pop(replica, None)
            world.turns.lose(replica)
            if replica in world.going_on:
                for shard in range(shards):
                    assert replica in world.going_on
                    if shard == shards - 1:
                        world.end(replica)
                    world.turns.settled(replica)
            else:
                world.turns.settled(replica)
        elif replica in world.going_on:
            world.end(replica)
            world.turns.over(replica)
        elif replica not in world.asked:
            world.asked[replica] = step
            world.turns.ask(replica, step)
        assert max(world.overlaps(), default=0) <= most
    while world.asked:  # when all turns end, whoever has asked has a turn
        before = len(world.asked)
        assert world.going_on
        for replica in list(world.going_on):
            world.end(replica)
            world.turns.over(replica)
        assert len(world.asked) < before
    assert max(world.overlaps(), default=0) <= most


def test_as_many_turns_as_allowed_go_on_at_once():
    """Neither fewer than allowed, nor one after the other."""
    world = Replicas(8, 3, 1)
    for replica in range(8):
        world.asked[replica] = 1
        world.turns.ask(replica, 1)
    assert sorted(world.going_on) == [0, 1, 2, 3]
    world.end(0)
    world.turns.over(0)
    assert sorted(world.going_on) == [1, 2, 3]  # each overlaps with three already


@pytest.mark.parametrize(
    ("bound", "n_fetch", "n_push", "most"),
    [(0, 1, 1, None), (1, 1, 1, 1), (7, 1, 1, 7), (2, 3, 1, 0), (5, 3, 1, 1), (4, 1, 5, 4), (3, 5, 5, 1)],
)
def test_overlaps_that_keep_a_bound(bound, n_fetch, n_push, most):
    optimizer = OptimizerSection(n_fetch=n_fetch, n_push=n_push)
    assert most_overlaps(ServerSection(max_staleness=bound), optimizer) == most
    assert most_overlaps(ServerSection(max_staleness=bound or 1, on_stale="discard"), optimizer) is None


def pushes_by_fetch(n_fetch: int, n_push: int, steps: int) -> int:
    """Return how many pushes of a loop of so many steps are counted from the same fetch, at most."""
    counts, accrued, fetch = {}, 0, 0
    for step in range(steps):
        if step % n_fetch == 0:
            fetch = step
        accrued += 1
        if step % n_push == 0:
            counts[fetch], accrued = counts.get(fetch, 0) + 1, 0
    if accrued:
        counts[fetch] = counts.get(fetch, 0) + 1
    return max(counts.values())


@pytest.mark.parametrize("n_fetch", range(1, 8))
@pytest.mark.parametrize("n_push", range(1, 8))
def test_the_least_bound_is_that_of_a_loop_alone(n_fetch, n_push):
    least = max(pushes_by_fetch(n_fetch, n_push, steps) for steps in range(1, 120)) - 1
    optimizer = {"n_fetch": n_fetch, "n_push": n_push}
    for bound in range(1, least):
        with pytest.raises(UserError, match=rf"max_staleness = {bound} cannot be kept.*to {least} or more"):
            Run(optimizer=optimizer, server={"max_staleness": bound})
    Run(optimizer=optimizer, server={"max_staleness": max(least, 1)})


BOUND = {"max_staleness": 4}
CONSTANT = {"delay_compensation": "constant"}
REFUSED = [
    ({"on_stale": "discard"}, {}, r'on_stale = "discard" needs a bound: set server\.max_staleness'),
    (BOUND, {"method": "sandblaster"}, r"max_staleness = 4 is for Downpour: leave it out"),
    (BOUND | {"overlap": "threads"}, {}, r'server\.overlap to "none", or server\.on_stale to "discard"'),
    (
        {"max_staleness": 2, "on_stale": "discard", "overlap": "threads"},
        {"n_fetch": 3},
        r"alone are 3 versions \(optimizer\.n_fetch = 3, .*set server\.max_staleness to 3 or more, or a smaller",
    ),
    (BOUND | {"on_stale": "discard", "gradients": "layers"}, {}, r'server\.gradients = "whole", or server\.on_stale'),
    ({}, CONSTANT | {"method": "sandblaster"}, r'delay_compensation = "constant" is for Downpour'),
    ({}, CONSTANT | {"n_push": 2}, r"set optimizer\.n_push = 1, not 2"),
    ({}, CONSTANT | {"local_rate": 0.5}, r"optimizer\.local_rate = 0, not 0\.5"),
    ({"overlap": "threads"}, CONSTANT, r'take their place: set server\.overlap = "none"'),
]


@pytest.mark.parametrize(("server", "optimizer", "message"), REFUSED)
def test_settings_that_do_not_go_together_are_refused_with_what_would(server, optimizer, message):
    with pytest.raises(UserError, match=message):
        Run(server=server, optimizer=optimizer)


@pytest.mark.parametrize("kind", RULES)
def test_the_rate_of_each_rule_is_divided_by_the_staleness(kind):
    random = np.random.default_rng(1)
    w, g = random.normal(size=(2, 50)).astype(np.float32)
    section = OptimizerSection(rule=kind, staleness_rate="inverse", learning_rate=0.03)
    for staleness in (0, 1, 2, 7):
        ours, chosen = w.copy(), rule(section)
        chosen.apply(ours, g, chosen.init(w), Moment(staleness=staleness))
        twin = RuleTwin(section, w).step(w, g, 1 / max(1, staleness))
        np.testing.assert_array_equal(ours, twin)


def compensated(g, w, v, factor, squares=None, beta=0.0):
    """Return the gradient as the formula says, one operation after the other; `squares` is updated."""
    kind = g.dtype.type
    with np.errstate(over="ignore", invalid="ignore"):
        if squares is None:
            found = g + kind(factor) * (g * (g * (w - v)))
        else:
            squares[:] = kind(beta) * squares + kind(1 - beta) * (g * g)
            found = g + kind(factor) * (g * (g / np.sqrt(squares + kind(1e-7)) * (w - v)))
    return np.where((w != v) & np.isfinite(found), found, g)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40)
@given(
    size=st.integers(0, 100),
    offset=st.integers(0, 5),
    seed=st.integers(0, 2**32),
    factor=st.sampled_from([0.0, 0.04, 2.0]),
    beta=st.sampled_from([0.0, 0.5, 0.95]),
    magnitude=st.sampled_from([1e-30, 1e-6, 1.0, 1e6, 1e25]),
)
def test_compensation_equals_its_naive_twin_bit_for_bit(dtype, size, offset, seed, factor, beta, magnitude):
    random = np.random.default_rng(seed)
    g, w, v, out = random.normal(size=(4, offset + size)).astype(dtype)[:, offset:]
    g, v = g * dtype(magnitude), np.where(random.random(size) < 0.5, v, w)
    updates.compensate(out, g, w, v, factor)
    np.testing.assert_array_equal(out, compensated(g, w, v, factor))
    assert np.isfinite(out).all()
    ours = np.abs(random.normal(size=size)).astype(dtype)
    twins = ours.copy()
    for _ in range(3):
        updates.compensate_adaptively(out, g, w, v, ours, factor, beta)
        np.testing.assert_array_equal(out, compensated(g, w, v, factor, twins, beta))
        np.testing.assert_array_equal(ours, twins)
        assert np.isfinite(out).all()


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("way", ["constant", "adaptive"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_compensated_rules_equal_their_twins_in_blocks_of_any_size(monkeypatch, kind, way, dtype):
    monkeypatch.setattr(compensation, "_BLOCK", 33)
    random = np.random.default_rng(2)
    section = OptimizerSection(rule=kind, delay_compensation=way, weight_decay=0.01)
    w = random.normal(size=100).astype(dtype)
    ours, twins, twin = w.copy(), w.copy(), RuleTwin(section, w)
    chosen, squares = rule(section), np.zeros_like(w) if way == "adaptive" else None
    state = chosen.init(ours)
    assert set(state) == set(chosen.state_names) == {*twin.state, *(["delay_mean_square"] if way == "adaptive" else [])}
    for update in range(1, 5):
        g, v = random.normal(size=(2, 100)).astype(dtype)
        chosen.apply_delayed(ours, g, v, state, Moment(update))
        twins = twin.step(twins, compensated(g, twins, v, section.compensation_factor, squares, 0.95))
        np.testing.assert_array_equal(ours, twins)


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("way", ["constant", "adaptive"])
def test_a_gradient_that_is_not_stale_keeps_its_bits(kind, way):
    random = np.random.default_rng(3)
    w, g = random.normal(size=(2, 100)).astype(np.float32)
    g[::7] = -0.0
    plain, with_it = rule(OptimizerSection(rule=kind)), rule(OptimizerSection(rule=kind, delay_compensation=way))
    one, two = w.copy(), w.copy()
    states = plain.init(w), with_it.init(w)
    for update in range(1, 4):
        plain.apply(one, g, states[0], Moment(update))
        with_it.apply(two, g, states[1], Moment(update))
        assert one.tobytes() == two.tobytes()
        for name, array in states[0].items():
            assert array.tobytes() == states[1][name].tobytes()


def test_the_mean_of_a_delayed_newton_step_is_nearer_to_the_minimum():
    """Of squares the gradient's change is known: with one parameter of curvature g * g, compensation is exact."""
    w, v, g = np.full(1, 0.5), np.full(1, 1.0), np.full(1, 2.0)
    out = np.empty(1)
    updates.compensate(out, g, w, v, 1.0)
    assert out[0] == 2.0 + 4.0 * (0.5 - 1.0)
