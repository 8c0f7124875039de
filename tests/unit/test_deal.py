"""The deal: every batch is learned, whichever replicas are given up, and resumed under any number."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmpi.data.deal import Deal, DealPhase, numbers
from dbmpi.data.stream import Stream


def dealt(stream: Stream, replicas: int, warmstart: int = 0) -> list[list[int]]:
    """Return the numbers of each replica's batches."""
    deal = Deal(stream, replicas, warmstart)
    return [list(numbers(stream, deal.share(replica))) for replica in range(replicas)]


def test_dealing_in_turn_and_warmstart():
    stream = Stream(10)
    assert dealt(stream, 3) == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
    assert dealt(stream, 3, 2) == [[0, 1, 2, 5, 8], [3, 6, 9], [4, 7]]
    assert dealt(stream, 2, 99) == [list(range(10)), []]


def test_what_is_left_is_compact():
    left = Deal(Stream(100), 3).left([3, 1, 0])  # learned: 0, 3, 6 and 1
    assert left == Stream(100, frontier=7, holes=(2, 4, 5))
    assert [left.item(position) for position in range(5)] == [2, 4, 5, 7, 8]
    # Nothing learned changes nothing, and everything learned leaves nothing.
    assert Deal(left, 4).left([0, 0, 0, 0]) == left
    assert Deal(left, 1).left([len(left)]) == Stream(100, frontier=100)


def test_the_first_taker_gets_the_rest_of_the_warmstart():
    deal = Deal(Stream(10), 3, warmstart=4)
    deal.give_up(0, learned=1, takers=[1, 2])
    assert list(numbers(deal.stream, deal.take(1, drawn=0))) == [1, 2, 3, 5, 7, 8]
    assert list(numbers(deal.stream, deal.take(2, drawn=0))) == [4, 6, 9]
    assert [deal.warm(replica) for replica in (1, 2)] == [3, 0]


def test_a_spare_replica_goes_on_where_another_one_stopped():
    deal = Deal(Stream(9), 2, spares=1)
    assert deal.share(2) == ()
    deal.give_up(1, learned=2, takers=[2])
    assert not deal.owes(0)
    assert list(numbers(deal.stream, deal.take(2, drawn=0))) == [5, 7]


def in_phases(positions: list[int], replicas: int, phases: list[DealPhase]) -> list[list[int]]:
    """Deal one position at a time: the naive twin."""
    ends = list(itertools.accumulate(phase.batches for phase in phases))
    found: list[list[int]] = [[] for _ in range(replicas)]
    for number, position in enumerate(positions):
        phase = next((phase for phase, end in enumerate(ends) if number < end), len(phases))
        start = ends[phase - 1] if phase else 0
        active = min(phases[phase].replicas, replicas) if phase < len(phases) else replicas
        found[(number - start) % active].append(position)
    return found


_phases = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 6)).map(lambda pair: DealPhase(*pair)), max_size=5)


@given(st.integers(0, 60), st.integers(1, 6), st.integers(0, 20), _phases)
def test_phases_are_dealt_to_those_that_learn_by_then(total, replicas, warmstart, phases):
    deal = Deal(Stream(total), replicas, warmstart, phases=phases)
    shares = [list(numbers(deal.stream, deal.share(replica))) for replica in range(replicas)]
    assert shares == in_phases(list(range(total)), replicas, [DealPhase(warmstart, 1), *phases])


@given(st.data())
def test_a_warmstart_that_ends_is_divided(data):
    """Whoever has it by then, after others of it were given up: everything that is left is dealt, as the twin does."""
    total, replicas = data.draw(st.integers(0, 60)), data.draw(st.integers(1, 6))
    deal = Deal(Stream(total), replicas, warmstart=total)
    learned, living, warm = [0] * replicas, list(range(replicas)), 0
    for _ in range(data.draw(st.integers(0, replicas - 1))):
        learned[warm] = data.draw(st.integers(0, sum(map(len, deal.share(warm)))))
        living.remove(warm)
        deal.give_up(warm, learned[warm], living)
        warm = living[0]
        deal.take(warm, 0)
    before = sum(learned)
    drawn = learned[warm] = data.draw(st.integers(0, total - before))
    phases = data.draw(_phases)
    deal.end_warmstart(warm, drawn, living[1:], phases)
    assert deal.left(learned) == Stream(total, frontier=before + drawn)
    expected = in_phases(list(range(before + drawn, total)), len(living), phases)
    for replica, own in zip(living, expected, strict=True):
        assert deal.owes(replica) == bool(own)
        assert list(numbers(deal.stream, deal.take(replica, learned[replica]))) == own
        assert deal.warm(replica) == 0
    for replica in living:
        learned[replica] += data.draw(st.integers(0, sum(map(len, deal.share(replica)))))
    left = deal.left(learned)
    assert len(left) == total - sum(learned)


@st.composite
def _interruptions(draw):
    total = draw(st.integers(0, 60))
    runs = draw(
        st.lists(st.tuples(st.integers(1, 6), st.integers(0, 12), st.randoms(use_true_random=False)), max_size=5)
    )
    return total, runs


@given(_interruptions())
def test_every_batch_is_learned_exactly_once(case):
    """Any sequence of sessions, with any number of replicas and any warmstart; in each, replicas are given up.

    The naive twin draws one batch at a time, and keeps lists of what each replica has drawn and learned.
    """
    total, runs = case
    stream, learned = Stream(total), []
    for replicas, warmstart, random in runs:
        deal, living = Deal(stream, replicas, warmstart), set(range(replicas))
        ways = [numbers(stream, deal.share(replica)) for replica in range(replicas)]
        drawn: list[list[int]] = [[] for _ in range(replicas)]
        done = [0] * replicas
        for _ in range(random.randint(0, 40)):
            one = random.choice(sorted(living))
            action = random.random()
            if action < 0.7:
                drawn[one] += [number for number in [next(ways[one], None)] if number is not None]
                done[one] = random.randint(done[one], len(drawn[one]))
            elif action < 0.85 and deal.owes(one):
                ways[one] = numbers(stream, deal.take(one, len(drawn[one])))
            elif action > 0.95 and len(living) > 1:
                living.remove(one)
                deal.give_up(one, done[one], sorted(living))
        learned += [number for one in range(replicas) for number in drawn[one][: done[one]]]
        assert len(learned) == len(set(learned))
        stream = deal.left(done)
        # What is left is everything but what was learned, in increasing order.
        assert [stream.item(position) for position in range(len(stream))] == sorted(set(range(total)) - set(learned))
        # Nothing at or beyond the frontier is learned, and the one before it is (otherwise the holes are not compact).
        assert stream.frontier == max(learned, default=-1) + 1
    assert sorted(learned + dealt(stream, 1)[0]) == list(range(total))


def test_long_streams_are_handled_without_listing_them():
    stream = Deal(Stream(10**12), 3).left([10**6, 10**6 - 3, 10**6])
    assert len(stream.holes) == 3
    assert stream.frontier == 3 * 10**6
    deal = Deal(stream, 2)
    assert next(numbers(stream, deal.share(1))) == stream.holes[1]
    deal.give_up(1, learned=10**9, takers=[0])
    assert next(numbers(stream, deal.take(0, drawn=10**8))) > 10**8


def test_counts_beyond_what_was_dealt_are_refused():
    with pytest.raises(ValueError, match="dealt"):
        Deal(Stream(4), 2).left([3, 0])
