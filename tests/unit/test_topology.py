"""Which rank plays which role: exact cover for every world, and refusals whose advice works."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import pytest

from dbmpi.config import TopologySection
from dbmpi.errors import UserError
from dbmpi.mpi.topology import Plan, plan

LARGEST = 12
GIVEN = (None, 1, 2, 3, 4, 5, 7, 13)


def sections() -> Iterator[TopologySection]:
    for shards, replicas, partitions in itertools.product(GIVEN, GIVEN, (None, 1, 2, 3, 5)):
        for colocate in (False, True):
            yield TopologySection(shards=shards, replicas=replicas, partitions=partitions, colocate=colocate)


def plans(*, shards_first: bool = False) -> Iterator[Plan]:
    for shards, replicas, partitions in itertools.product(range(1, LARGEST), repeat=3):
        for colocate in (False, True):
            made = Plan(shards, replicas, partitions, colocate, shards_first=shards_first)
            if made.world <= LARGEST and (not colocate or shards <= made.workers):
                yield made


@pytest.mark.parametrize("first", [False, True], ids=["spread", "first"])
def test_every_rank_has_a_role_and_every_role_a_rank(first: bool) -> None:
    for made in plans(shards_first=first):
        ranks = range(made.world)
        shards, workers = [made.shard_of(rank) for rank in ranks], [made.worker_of(rank) for rank in ranks]
        assert sorted(shard for shard in shards if shard is not None) == list(range(made.shards))
        assert sorted(worker for worker in workers if worker is not None) == list(range(made.workers))
        assert [shards[rank] for rank in made.shard_ranks] == list(range(made.shards))
        assert [workers[rank] for rank in made.worker_ranks] == list(range(made.workers))
        roles = [(shard is not None) + (worker is not None) for shard, worker in zip(shards, workers, strict=True)]
        assert min(roles) >= 1
        assert made.colocate or max(roles) == 1
        assert made.shard_ranks[0] == 0


def test_shards_are_spread_evenly() -> None:
    """So that, with several nodes, none has all of them: gaps between neighbours differ by one at most."""
    for made in plans():
        edges = [*made.shard_ranks, made.world]
        gaps = [right - left for left, right in itertools.pairwise(edges)]
        assert max(gaps) - min(gaps) <= 1


def test_shards_are_on_the_first_ranks_where_that_is_wanted() -> None:
    assert all(made.shard_ranks == tuple(range(made.shards)) for made in plans(shards_first=True))
    assert plan(TopologySection(shards=3, shard_ranks="first"), 9).shard_ranks == (0, 1, 2)


def test_what_is_given_is_kept_and_what_fits_is_accepted() -> None:
    accepted = 0
    for section, world in itertools.product(sections(), range(1, LARGEST + 1)):
        try:
            made = plan(section, world)
        except UserError:
            continue
        accepted += 1
        assert made.world == world
        for name in ("shards", "replicas", "partitions"):
            assert getattr(section, name) in (None, getattr(made, name))
        assert made.colocate == section.colocate or world == 1
        assert len(set(made.shard_ranks)) == made.shards
    assert accepted > 500


def test_a_section_that_says_everything_is_accepted_where_it_fits() -> None:
    for made in plans():
        section = TopologySection(
            shards=made.shards, replicas=made.replicas, partitions=made.partitions, colocate=made.colocate
        )
        assert plan(section, made.world) == made


@pytest.mark.parametrize("world", range(1, LARGEST + 1))
def test_an_empty_section_fits_every_world(world: int) -> None:
    made = plan(TopologySection(), world)
    assert (made.shards, made.partitions, made.replicas) == (1, 1, max(world - 1, 1))


def advised(message: str) -> Iterator[tuple[dict[str, object], int | None]]:
    """Yield the ways out that a refusal names: settings to change, and the number of ranks to start."""
    ranks = re.search(r"Start (\d+) ranks?", message)
    if ranks:
        yield {}, int(ranks[1])
    settings: dict[str, object] = {}
    for name, value in re.findall(r"topology\.(\w+) = (\w+)", message):
        settings[name] = value == "true" if value in ("true", "false") else int(value)
    if settings:
        yield settings, None


def refusal(section: TopologySection, world: int) -> str | None:
    try:
        plan(section, world)
    except UserError as error:
        return str(error)
    return None


def test_the_advice_of_every_refusal_works() -> None:
    """Each way out, tried by itself: another number of ranks, or other settings."""
    refused = 0
    for section, world in itertools.product(sections(), range(1, LARGEST + 1)):
        message = refusal(section, world)
        if message is None:
            continue
        refused += 1
        ways = list(advised(message))
        assert any(settings for settings, _ in ways), message
        for settings, ranks in ways:
            changed = TopologySection.model_validate(section.model_dump() | settings)
            assert refusal(changed, ranks or world) is None, (section, world, message)
    assert refused > 500


def test_a_refusal_says_what_was_started_and_what_is_needed() -> None:
    with pytest.raises(UserError, match=r"4 ranks started, but 2 replicas x 1 partition \+ 1 shard need 3"):
        plan(TopologySection(shards=1, replicas=2, partitions=1), 4)


def test_a_plan_reads_as_a_sentence() -> None:
    assert str(Plan(1, 3)).startswith("4 ranks: 1 shard on ")
    assert str(Plan(2, 2, colocate=True)).startswith("2 ranks: 2 shards on ")


@pytest.mark.parametrize("name", ["shards", "replicas", "partitions"])
@pytest.mark.parametrize("colocate", [False, True])
def test_a_number_far_too_large_is_refused_at_once(name: str, colocate: bool) -> None:
    """Advice that tried all worlds up to that number would fill the memory."""
    with pytest.raises(UserError, match=r"[Ss]et topology\."):
        plan(TopologySection(**{name: 10**15}, colocate=colocate), 4)


def test_evaluators_have_the_last_ranks_and_no_shard() -> None:
    for shards, replicas, partitions, evaluators in itertools.product(
        range(1, 5), range(1, 4), range(1, 4), range(1, 4)
    ):
        for colocate in (False, True):
            made = Plan(shards, replicas, partitions, colocate, evaluators=evaluators)
            if colocate and shards > replicas * partitions:
                continue
            last = range(made.world - evaluators * partitions, made.world)
            assert [rank for rank in range(made.world) if made.evaluates(rank)] == list(last)
            assert not {*made.shard_ranks} & {*last}
            assert {made.replica_of(rank) for rank in last} == {*range(replicas, replicas + evaluators)}
            without = Plan(shards, replicas, partitions, colocate)
            assert made.shard_ranks == without.shard_ranks
            assert made.worker_ranks[: without.workers] == without.worker_ranks
            section = TopologySection(shards=shards, replicas=replicas, partitions=partitions, evaluators=evaluators)
            assert colocate or plan(section, made.world) == made


@pytest.mark.parametrize("evaluators", [1, 2, 5, 10**9])
@pytest.mark.parametrize(
    "given", [{}, {"replicas": 2}, {"shards": 2}, {"partitions": 2}, {"colocate": True}, {"spares": 1}]
)
def test_more_evaluators_than_ranks_are_refused_with_numbers_that_fit(evaluators: int, given: dict[str, int]) -> None:
    section, accepted = TopologySection(evaluators=evaluators, **given), 0
    for world in range(1, LARGEST + 1):
        message = refusal(section, world)
        if message is None:
            made = plan(section, world)
            accepted += 1
            assert (made.world, made.evaluators) == (world, evaluators)
            assert made.learning >= 1
            continue
        ways = list(advised(message))
        assert any(settings for settings, _ in ways), message
        assert len(message) < 300
        for settings, ranks in ways:
            changed = TopologySection.model_validate(section.model_dump() | settings)
            assert refusal(changed, ranks or world) is None, (world, message)
    assert accepted or evaluators >= 5
