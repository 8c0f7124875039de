"""Which rank takes which part: replicas on one host wherever they fit, shards spread, for any hosts and order."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmpi.mpi.host_placement import host_map, ranks_by_position, spans
from dbmpi.mpi.topology import Plan


def numbered(names: list[int]) -> np.ndarray:
    """Return for each rank the lowest rank on its host."""
    return np.array([names.index(name) for name in names])


def apart(plan: Plan, hosts: np.ndarray) -> int:
    """Return how many replicas are on several hosts, the naive way."""
    count = 0
    for instance in range(plan.replicas + plan.evaluators):
        count += len({int(hosts[rank]) for rank in plan.ranks_of(instance)}) > 1
    return count


def most_shards(plan: Plan, hosts: np.ndarray) -> int:
    found = [int(hosts[rank]) for rank in plan.shard_ranks]
    return max(found.count(host) for host in found)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Plan, np.ndarray]:
    colocate, partitions = draw(st.booleans()), draw(st.integers(1, 4))
    replicas, evaluators = draw(st.integers(1, 5)), draw(st.integers(0, 2))
    workers = (replicas + evaluators) * partitions
    shards = draw(st.integers(1, replicas * partitions if colocate else 5))
    plan = Plan(shards, replicas, partitions, colocate, evaluators=evaluators)
    assert plan.world == workers + (0 if colocate else shards)
    names = draw(st.lists(st.integers(0, 4), min_size=plan.world, max_size=plan.world))
    return plan, numbered(names)


@given(worlds())
def test_every_rank_has_one_position_and_no_replica_is_apart_that_was_together(world) -> None:
    plan, hosts = world
    ranks = ranks_by_position(plan, hosts)
    assert sorted(ranks) == list(range(plan.world))
    assert ranks[0] == 0
    before, after = hosts, hosts[list(ranks)]
    assert (apart(plan, after), most_shards(plan, after)) <= (apart(plan, before), most_shards(plan, before))
    if len(set(hosts.tolist())) == 1:
        assert ranks == tuple(range(plan.world))


@pytest.mark.parametrize(
    "plan", [Plan(2, 2, 2), Plan(1, 3, 2, evaluators=0), Plan(2, 3, 1), Plan(3, 3, 2, colocate=True)]
)
def test_no_order_keeps_more_replicas_together(plan: Plan) -> None:
    random = np.random.default_rng(4)
    for _ in range(12):
        hosts = numbered(random.integers(0, 3, plan.world).tolist())
        found = apart(plan, hosts[list(ranks_by_position(plan, hosts))])
        orders = ((0, *rest) for rest in itertools.permutations(range(1, plan.world)))
        assert found == min(apart(plan, hosts[list(order)]) for order in orders), hosts


def test_an_order_that_is_good_stays() -> None:
    plan = Plan(2, 2, 4)
    assert ranks_by_position(plan, numbered([0] * 5 + [1] * 5)) == tuple(range(10))
    # Ranks that a launcher has dealt to the hosts in turn are put together again.
    hosts = numbered([0, 1] * 5)
    ranks = ranks_by_position(plan, hosts)
    assert apart(plan, hosts[list(ranks)]) == 0
    assert most_shards(plan, hosts[list(ranks)]) == 1
    assert ranks[:5] == (0, 2, 4, 6, 8)


def test_hosts_that_were_chosen_for_shards_keep_them():
    """As in a job with shards on nodes of their own: nothing else could be worse for the shards' memory."""
    plan = Plan(shards=2, replicas=3, partitions=2, shards_first=True)
    assert ranks_by_position(plan, numbered([0, 0, 1, 1, 1, 2, 2, 2])) == tuple(range(8))


def test_the_map_names_every_role_once() -> None:
    plan = Plan(2, 3, 2, evaluators=1)
    hosts = numbered([0] * 5 + [1] * 5)
    ranks = ranks_by_position(plan, hosts)
    lines = list(host_map(plan, ranks, hosts[list(ranks)], {0: "node1", 5: "node2"}))
    assert lines == [
        "node1 (ranks 0-4): shard 0, replicas 0-1",
        "node2 (ranks 5-9): shard 1, replica 2, evaluator 0",
    ]
    colocated = Plan(1, 1, 3, colocate=True)
    lines = list(host_map(colocated, (0, 1, 2), np.array([0, 0, 2]), {0: "a", 2: "b"}))
    assert lines == ["a (ranks 0-1): shard 0, partitions 0-1 of replica 0", "b (rank 2): partition 2 of replica 0"]
    many = Plan(1, 39)
    lines = list(host_map(many, tuple(range(40)), np.arange(40), {}))
    assert lines[-1] == "... and 24 more hosts"
    assert len(lines) == 17


def test_numbers_are_written_as_spans() -> None:
    assert spans([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert spans([]) == ""
