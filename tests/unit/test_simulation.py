"""Virtual time: distributions, versions that are shared, and clusters beside a naive twin that copies everything."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbmpi.config import OptimizerSection, Run, ServerSection, SimulationSection, TimesSection
from dbmpi.config.simulation import mistakes
from dbmpi.data.deal import first_share, numbers
from dbmpi.data.stream import Order, Stream
from dbmpi.downpour.turns import most_overlaps
from dbmpi.errors import UserError
from dbmpi.index.layout import Stretch, cut
from dbmpi.kernels import updates
from dbmpi.objective import Outcome
from dbmpi.paramserver.clip import Clip
from dbmpi.paramserver.rules import rule
from dbmpi.paramserver.schedule import Moment, Schedule
from dbmpi.simulation.cluster import ClusterTimes, VirtualCluster
from dbmpi.simulation.gradients import VirtualGradients
from dbmpi.simulation.shard import VirtualShard
from dbmpi.simulation.times import Times, VirtualClock
from dbmpi.simulation.versions import VersionedParameters

# Times

KINDS = ("constant", "exponential", "uniform", "gamma", "lognormal")


@given(
    kind=st.sampled_from(KINDS),
    mean=st.floats(1e-3, 1e3),
    relative=st.floats(0.05, 0.55),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=50, deadline=None)
def test_times_have_the_mean_and_the_deviation_that_they_are_given(kind, mean, relative, seed):
    deviation = {"constant": 0.0, "exponential": mean}.get(kind, relative * mean)
    section = TimesSection(distribution=kind, mean=mean, deviation=deviation)
    draw = Times(section, np.random.default_rng(seed))
    found = np.array([draw() for _ in range(4000)])
    assert found.min() >= 0
    assert abs(found.mean() - mean) <= 6 * deviation / math.sqrt(4000) + 1e-12 * mean
    assert found.std() == pytest.approx(deviation, rel=0.3, abs=1e-12 * mean)


def test_times_follow_from_the_seed():
    section = SimulationSection(network=TimesSection(distribution="gamma", mean=1.0, deviation=0.5))
    first, again, other, later = (ClusterTimes.from_config(section, *key) for key in ((1, 0), (1, 0), (2, 0), (1, 5)))
    drawn = [[times.network() for _ in range(600)] for times in (first, again, other, later)]
    assert drawn[0] == drawn[1]
    assert len({*map(tuple, drawn)}) == 3
    assert first.compute() != first.network()


@pytest.mark.parametrize(
    ("values", "would_do"),
    [
        ({"distribution": "normal", "mean": 0.1, "deviation": 0.02}, "'lognormal' with mean = 0.1, deviation = 0.02"),
        ({"distribution": "uniform", "mean": 0.1, "deviation": 0.06}, "set deviation to 0.0577 or less"),
        (
            {"distribution": "uniform", "mean": 0.1, "deviation": 0.06},
            "is from -0.00392 to 0.204 s and can be negative",
        ),
        ({"distribution": "gamma", "mean": 0.2}, "set e.g. mean = 0.2, deviation = 0.05"),
        ({"distribution": "lognormal"}, "set e.g. mean = 0.1, deviation = 0.025"),
        ({"distribution": "exponential", "mean": 2.0, "deviation": 1.0}, "a deviation of 2 s, not 1"),
        ({"mean": 2.0, "deviation": 1.0}, "a deviation of 0 s, not 1"),
        ({"mean": -1.0}, "greater than or equal to 0"),
        ({"mean": math.inf}, "finite"),
    ],
)
def test_times_that_could_be_negative_are_refused_with_numbers_that_would_do(values, would_do):
    with pytest.raises(UserError, match=r"simulation\.compute") as caught:
        Run(simulation={"compute": values})
    assert would_do in str(caught.value)


@given(mean=st.floats(1e-6, 1e6))
def test_the_deviation_that_would_do_does(mean):
    with pytest.raises(UserError) as caught:
        TimesSection(distribution="uniform", mean=mean, deviation=mean)
    most = float(str(caught.value).split("set deviation to ")[1].split()[0])
    TimesSection(distribution="uniform", mean=mean, deviation=most)


def test_time_has_to_pass():
    for name in ("compute", "slowness"):
        with pytest.raises(UserError, match=rf"simulation.{name}.mean = 0: .* set simulation.{name}.mean above 0"):
            Run(simulation={name: {"mean": 0.0}})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optimizer": {"method": "sandblaster"}}, 'optimizer.method = "downpour"'),
        ({"server": {"overlap": "threads"}}, 'server.overlap = "none"'),
        ({"server": {"fetch": "shared"}}, 'server.fetch = "copied"'),
        ({"server": {"gradients": "layers"}}, 'server.gradients = "whole"'),
        ({"server": {"wire": "bfloat16"}}, 'server.wire = "float32"'),
        ({"topology": {"spares": 1}}, "set it to 0"),
    ],
)
def test_what_virtual_time_does_not_have_is_refused(sections, message):
    assert list(mistakes(Run())) == []
    (found,) = mistakes(Run(**sections))
    assert message in found


# Versions


@given(st.data())
@settings(max_examples=200)
def test_versions_that_are_held_stay_as_they_are_and_need_one_array_each(data):
    parameters, present = VersionedParameters(np.zeros(3)), 0
    held = []
    most = 0
    for _ in range(data.draw(st.integers(1, 60))):
        action = data.draw(st.sampled_from(("hold", "release", "change")))
        if action == "hold":
            held.append((parameters.hold(), present))
        elif action == "release" and held:
            parameters.release(held.pop(data.draw(st.integers(0, len(held) - 1)))[0])
        elif action == "change":
            parameters.changeable()[:] += 1
            present += 1
        most = max(most, len({version for _, version in held} | {present}))
        assert parameters.values.tolist() == [present] * 3
        for version, number in held:
            assert version.values.tolist() == [number] * 3
    assert parameters.arrays <= most


# Clusters

SIZE, SAMPLES = 11, 37


class Numbers:
    """Batches that are their numbers."""

    def __init__(self, batch_size: int, epochs: float) -> None:
        self.order = Order(SAMPLES, batch_size, epochs, 1)

    def batch(self, number: int) -> int:
        return number


class Spring:
    """A gradient that depends on the parameters, element by element, and on the number of the batch."""

    size = SIZE

    def loss_and_gradient(self, parameters, batch, gradient, on_gradient=None, *, step=0, add=False):
        found = gradient_of(parameters, batch)
        gradient[:] = gradient + found if add else found
        return Outcome(1, float(batch), 0)


def gradient_of(parameters: np.ndarray, batch: int) -> np.ndarray:
    random = np.random.default_rng(batch)
    found: np.ndarray = (parameters - random.normal(size=SIZE).astype(np.float32)) * np.float32(random.uniform(0.5, 1))
    return np.full_like(found, np.nan) if batch % 13 == 12 else found


class Watch:
    """Notes what a cluster tells."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after = stop_after
        self.computed_batches: list[int] = []
        self.ended: list[int] = []
        self.learned: dict[int, int] = {}

    def poll(self) -> bool:
        return self.stop_after is not None and len(self.computed_batches) >= self.stop_after

    def computed(self, replica, log, outcome) -> None:
        self.computed_batches.append(replica.batch)

    def pushed(self, replica, log, push) -> None:
        self.learned[replica.number] = replica.learned

    def finished(self, replica, log) -> None:
        self.ended.append(replica.number)


def describe(**values) -> OptimizerSection:
    return OptimizerSection(**{"rule": "sgd", "learning_rate": 0.1, "batch_size": 4, "epochs": 4.0} | values)


def virtual(
    section: OptimizerSection,
    replicas: int,
    shards: int,
    times: SimulationSection,
    server: ServerSection | None = None,
    slowness: list[float] | None = None,
    stop_after: int | None = None,
) -> tuple[VirtualCluster, Watch]:
    server, batches = server or ServerSection(), Numbers(section.batch_size, section.epochs)
    drawn, watch, clock = ClusterTimes.from_config(times, 1, 0), Watch(stop_after), VirtualClock()
    if slowness is not None:
        factors = iter(slowness)
        drawn = ClusterTimes(
            compute=drawn.compute, network=drawn.network, service=drawn.service, slowness=lambda: next(factors)
        )
    applied = rule(section, SAMPLES)
    discard_above = server.max_staleness if server.on_stale == "discard" else 0
    held = [
        VirtualShard(number, part, applied, np.ones(len(part), np.float32), drawn.service, discard_above)
        for number, part in enumerate(cut(SIZE, shards))
    ]
    for shard in held:
        shard.begin(None)
    ranges, layers = [shard.held for shard in held], [range(4), range(4, SIZE)]
    stream = Stream(batches.order.batches)
    cluster = VirtualCluster(
        held,
        [numbers(stream, first_share(stream, number, replicas, section.warmstart)) for number in range(replicas)],
        lambda computed: VirtualGradients(Spring(), batches, ranges, layers, section, in_place=True, computed=computed),
        section,
        drawn,
        clock,
        watch,
        warmstart=section.warmstart,
        most_overlaps=most_overlaps(server, section),
    )
    cluster.run()
    return cluster, watch


class Naive:
    """The same without events, versions and late gradients: processes in turn, each with copies of its own."""

    def __init__(self, section, replicas, shards, times, server, slowness) -> None:
        self.section, self.times, self.slowness = section, times, slowness
        self.batches = Numbers(section.batch_size, section.epochs)
        self.rule, self.discards = rule(section, SAMPLES), server.max_staleness
        self.parts = cut(SIZE, shards)
        self.parameters = np.ones(SIZE, np.float32)
        self.states = [self.rule.init(self.parameters[part.start : part.stop]) for part in self.parts]
        self.versions, self.samples, self.free = [0] * shards, [0] * shards, [0.0] * shards
        self.staleness: list[list[int]] = [[] for _ in self.parts]
        stream = Stream(self.batches.order.batches)
        self.now, going_on = 0.0, []
        for number in range(replicas):
            going_on.append(
                (0.0, number, self.learn(number, list(numbers(stream, first_share(stream, number, replicas)))))
            )
        while going_on:
            going_on.sort(key=lambda process: process[:2])
            self.now, number, process = going_on.pop(0)
            when = next(process, None)
            if when is not None:
                going_on.append((when, number, process))

    def learn(self, number: int, share: list[int]) -> Iterator[float]:
        section, order = self.section, self.batches.order
        schedule = Schedule.from_config(section, SAMPLES)
        accrued, steps, samples = np.zeros(SIZE, np.float32), 0, 0
        fetches = True
        for step, batch in enumerate(share):
            begun = self.now
            if fetches or step % section.n_fetch == 0:
                fetched, versions = self.parameters.copy(), list(self.versions)
                walk, fetches = fetched.copy(), False
                begun += self.times.network.mean
            yield begun + self.slowness[number] * self.times.compute.mean
            gradient = gradient_of(walk, batch)
            accrued = gradient if steps == 0 else accrued + gradient
            steps, samples = steps + 1, samples + order.size(batch)
            if section.local_rate:
                moment = Moment(samples=order.before(batch), pushed=order.size(batch))
                updates.sgd(walk, gradient, section.local_rate * schedule(moment))
            if step % section.n_push == 0 or step == len(share) - 1:
                yield self.now + self.times.network.mean
                withheld = yield from self.push(accrued, steps, samples, fetched, versions)
                fetches = withheld
                steps = samples = 0

    def push(self, accrued, steps, samples, fetched, versions) -> Iterator[float]:
        section = self.section
        if section.accumulate == "mean" and steps > 1:
            accrued = accrued * np.float32(1 / steps)
        withheld = not np.isfinite(accrued).all()
        if section.clip_norm and not withheld:
            accrued = accrued.copy()
            Clip(section.clip_norm, [Stretch(0, 0, SIZE, pushed=True)], float)(accrued)
        ends = []
        for shard in range(len(self.parts)):
            self.free[shard] = max(self.now, self.free[shard]) + self.times.service.mean
            ends.append((self.free[shard], shard))
        for end, shard in sorted(ends):
            yield end
            part = slice(self.parts[shard].start, self.parts[shard].stop)
            stale = self.versions[shard] - versions[shard]
            if not withheld and not 0 < self.discards < stale:
                moment = Moment(self.versions[shard] + 1, self.samples[shard], samples, stale)
                if section.delay_compensation == "none":
                    self.rule.apply(self.parameters[part], accrued[part], self.states[shard], moment)
                else:
                    own = fetched[part], self.states[shard], moment
                    self.rule.apply_delayed(self.parameters[part], accrued[part], *own)
                self.versions[shard] += 1
                self.staleness[shard].append(stale)
            self.samples[shard] += samples
        return withheld


STEPS = [
    {},
    {"n_push": 3},
    {"n_fetch": 3},
    {"n_push": 2, "n_fetch": 3, "local_rate": 0.01},
    {"n_push": 3, "n_fetch": 2, "local_rate": 0.01, "accumulate": "mean"},
    {"n_fetch": 4, "local_rate": 0.05, "schedule": "inverse_root", "decay_epochs": 1.0},
    {"clip_norm": 1.5, "n_push": 2},
    {"delay_compensation": "constant", "compensation_factor": 0.5},
    {"delay_compensation": "adaptive", "rule": "adagrad"},
    {"staleness_rate": "inverse", "rule": "momentum", "warmup_epochs": 0.5},
]


@pytest.mark.parametrize("steps", STEPS, ids=str)
@given(
    replicas=st.integers(1, 7),
    shards=st.integers(1, 4),
    network=st.sampled_from((0.0, 0.3, 2.7)),
    service=st.sampled_from((0.0, 0.17, 1.9)),
    bound=st.sampled_from((0, 3, 5)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=12, deadline=None)
def test_a_cluster_does_what_a_naive_twin_does(steps, replicas, shards, network, service, bound, seed):
    section = describe(**steps)
    times = SimulationSection(
        compute=TimesSection(mean=1.0), network=TimesSection(mean=network), service=TimesSection(mean=service)
    )
    server = ServerSection(max_staleness=bound, on_stale="discard" if bound else "wait")
    slowness = np.random.default_rng(seed).uniform(0.3, 3, replicas).tolist()
    cluster, watch = virtual(section, replicas, shards, times, server, slowness)
    twin = Naive(section, replicas, shards, times, server, slowness)
    found = np.concatenate([shard.parameters for shard in cluster.shards])
    assert found.tobytes() == twin.parameters.tobytes()
    for number, shard in enumerate(cluster.shards):
        assert shard.version == twin.versions[number]
        assert shard.samples == twin.samples[number]
        assert sorted(shard.tally.staleness.counts.elements()) == sorted(twin.staleness[number])
        for name, array in shard.state.items():
            assert array.tobytes() == twin.states[number][name].tobytes()
    batches = Order(SAMPLES, section.batch_size, section.epochs, 1).batches
    assert sorted(watch.computed_batches) == list(range(batches))
    assert sorted(watch.ended) == list(range(replicas))
    assert sum(watch.learned.values()) == batches


@given(
    replicas=st.integers(1, 9),
    shards=st.integers(1, 3),
    bound=st.integers(1, 6),
    warmstart=st.sampled_from((0, 5, 1000)),
    n_push=st.sampled_from((1, 2)),
    stop_after=st.sampled_from((None, 3, 20)),
)
@settings(max_examples=60, deadline=None)
def test_replicas_that_wait_never_push_what_is_too_stale_and_finish(
    replicas, shards, bound, warmstart, n_push, stop_after
):
    section = describe(warmstart=warmstart, n_push=n_push)
    random = {"distribution": "exponential", "mean": 1.0}
    times = SimulationSection(
        compute=TimesSection(**random), network=TimesSection(**random), service=TimesSection(**random | {"mean": 0.1})
    )
    cluster, watch = virtual(
        section, replicas, shards, times, ServerSection(max_staleness=bound), stop_after=stop_after
    )
    batches = Order(SAMPLES, section.batch_size, section.epochs, 1).batches
    learned = sum(watch.learned.values())
    assert learned == batches if stop_after is None else learned <= batches
    assert len(set(watch.computed_batches)) == len(watch.computed_batches)
    assert sorted(watch.ended) == list(range(replicas))
    for shard in cluster.shards:
        assert shard.tally.staleness.max <= bound
    if stop_after is None:
        assert watch.computed_batches[: min(warmstart, batches)] == list(range(min(warmstart, batches)))


@pytest.mark.parametrize("service", [0.0, 0.05])
def test_the_vectors_in_memory_are_the_versions_that_are_needed(service):
    """One for each replica at most, one that changes, and a gradient: not a copy of each for each replica."""
    times = SimulationSection(service=TimesSection(mean=service))
    section = describe(epochs=40.0)
    for replicas in (1, 3, 20, 60):
        cluster, _ = virtual(section, replicas, 1, times)
        assert cluster.arrays <= replicas + 2
    cluster, _ = virtual(section, 60, 1, SimulationSection(), ServerSection(max_staleness=9))
    assert cluster.arrays <= 10 + 2
