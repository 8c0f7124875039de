"""The cost model: against sums by hand, by properties that any model must have, and with mistakes of users."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from dbmpi.cli.main import main
from dbmpi.config import Run
from dbmpi.errors import UserError
from dbmpi.network.description import Network
from dbmpi.plan import constants, quantities
from dbmpi.plan.candidates import Candidates, Choices, enumerate_ways
from dbmpi.plan.rates import between, between_both
from dbmpi.plan.recommendation import Planner
from dbmpi.plan.step import Hardware, expected_largest, step_times
from dbmpi.plan.throughput import _queues, predict
from dbmpi.plan.work import check_layers, work_of
from dbmpi.replica import placement

SPEECH = (2560, 2560, 2560, 2560, 8192)


def described(units=(64, 32), **sections) -> Run:
    hidden = [{"units": number, "activation": "sigmoid"} for number in units[:-1]]
    return Run.model_validate({"network": {"layers": [*hidden, {"units": units[-1]}]}, **sections})


def planner(units=(64, 32), inputs=48, known=None, max_staleness=0, **sections) -> Planner:
    run = described(units, **sections)
    return Planner(run, Network(run.network, (inputs,), 1), known or constants.reference(), max_staleness)


def cluster(**changes) -> Hardware:
    return replace(Hardware(nodes=8, cores=4, memory=2.0**34, bandwidth=1.25e9, latency=2e-5), **changes)


def plain_machine(**changes) -> constants.MachineConstants:
    """Return a machine of which every sum can be done by hand."""
    one = {
        "rates": dict.fromkeys(constants.KINDS, ((1.0, 1.0, 1000000000.0),)),
        "updates": dict.fromkeys(constants.STATES, ((1.0, 4000000000.0),)),
        "copies": ((1.0, 2e9),),
        "thread_gain": 1.0,
        "batch_bandwidth": 1e30,
        **dict.fromkeys(("step_seconds", "far_step_seconds", "service_seconds", "exchange_seconds"), 0.0),
        **dict.fromkeys(("far_exchange_seconds", "message_seconds", "spread", "rank_bytes"), 0.0),
        **dict.fromkeys(("loss_seconds", "partition_seconds", "poll_seconds"), 0.0),
    }
    return constants.reference().model_copy(update=one | changes)


@pytest.mark.parametrize(
    ("text", "value"), [("64 GiB", 2.0**36), ("1.5GB", 1.5e9), ("512MiB", 2.0**29), (" 1e3 kB ", 1e6)]
)
def test_memory_is_read(text, value):
    assert quantities.memory(text) == pytest.approx(value)


@pytest.mark.parametrize(("text", "value"), [("10 Gbit/s", 1.25e9), ("1GB/s", 1e9), ("100Mbit/s", 1.25e7)])
def test_bandwidths_are_read(text, value):
    assert quantities.bandwidth(text) == pytest.approx(value)
    assert quantities.bandwidth(quantities.shown_bandwidth(value)) == pytest.approx(value)


@pytest.mark.parametrize(
    "text", ["64", "64 gib", "-1 GiB", "0 GiB", "inf GiB", "GiB", "1e400 GiB", "nan", "1 GiB/s", ""]
)
def test_what_is_no_amount_is_refused_with_an_example(text):
    with pytest.raises(UserError, match="64 GiB"):
        quantities.memory(text)


def test_speeds_lie_on_a_power_law_between_measurements():
    points = ((10.0, 2.0), (1000.0, 8.0))
    assert between(points, 100.0) == pytest.approx(4.0)
    assert (between(points, 1.0), between(points, 1e6)) == (2.0, 8.0)
    both = tuple((size, samples, size * samples) for size in (1.0, 100.0) for samples in (1.0, 100.0))
    assert between_both(both, 10.0, 10.0) == pytest.approx(100.0)


@pytest.mark.parametrize("number", [1, 2, 5, 20, 128])
def test_the_largest_of_normal_numbers_is_as_large_as_drawn_ones(number):
    drawn = np.random.default_rng(1).standard_normal((40_000, number)).max(axis=1).mean()
    assert expected_largest(number) == pytest.approx(drawn, abs=0.03)


def test_work_of_a_cut_dense_network_by_hand():
    run = described((6, 4))
    network = Network(run.network, (5,), 1)
    whole, half = (work_of(network, placement.automatic(network.layers, number)) for number in (1, 2))
    # The gradient for the network's inputs is not computed: 4 operations a weight instead of 6.
    assert [layer.operations for layer in whole.layers] == [4 * 5 * 6, 6 * 6 * 4]
    assert (whole.parameters, whole.inputs, whole.turned) == (6 * 5 + 6 + 4 * 6 + 4, 5, 4)
    assert [layer.values for layer in whole.layers] == [0, 0]
    assert half.layers[0].operations == 4 * 5 * 3
    assert half.layers[1].operations == 6 * 6 * 4 // 2
    # Split by inputs, each of two workers gets sums for its 2 units from the other; by outputs it would get 3 inputs.
    assert (half.layers[1].values, half.layers[1].peers) == (2, 1)


def test_work_of_a_halo_by_hand():
    layers = [{"type": "local", "maps": 2, "field": 3}, {"type": "pooling", "size": 3}, {"units": 2}]
    run = Run.model_validate({"network": {"layers": layers}})
    network = Network(run.network, (1, 12, 10), 1)
    work = work_of(network, placement.automatic(network.layers, 2))
    # 10 x 8 outputs are cut into two halves of 5 rows; windows of 3 reach one row into the other half.
    assert work.layers[0].operations == 4 * (2 * 5 * 8) * 9
    assert (work.layers[1].values, work.layers[1].peers) == (2 * 1 * 8, 1)


def test_a_step_by_hand():
    run = described((6, 4))
    network = Network(run.network, (5,), 1)
    known = plain_machine(spread=0.1, message_seconds=1e-3)
    hardware = cluster(latency=1e-2, bandwidth=1e3)
    alone = step_times(work_of(network, placement.automatic(network.layers, 1)), 10, known, hardware, threads=2)
    assert alone.compute == pytest.approx((120 + 144) * 10 / 1e9 / 2)
    assert (alone.slowest, alone.exchange) == (0.0, 0.0)
    work = work_of(network, placement.automatic(network.layers, 2))
    both = step_times(work, 10, known, hardware, near=False)
    assert both.slowest == pytest.approx(both.compute * 0.1 * expected_largest(2))
    # Each of two workers gets 2 values a sample, and a quarter of 4 outputs for the loss, both forward and back.
    moved = 4 * 10 * (2 + 4 / 4)
    assert both.exchange == pytest.approx(2 * (2 * (1e-2 + 1e-3) + moved / 1e3))


def test_a_replica_and_a_shard_by_hand():
    run = described((64, 32), optimizer={"rule": "sgd", "most_withheld": 0, "batch_size": 16})
    one = Planner(run, Network(run.network, (48,), 1), plain_machine())
    size = 64 * 49 + 32 * 65
    assert one.demands.size == size
    found = one.predict(Candidates.one(1, 1, 1, ranks_of_node=2), cluster(nodes=1))
    compute = (4 * 48 * 64 + 6 * 64 * 32) * 16 / 1e9  # the layers are too small for two threads
    copy, apply = 4 * size / 2e9, 3 * 4 * size / 4e9
    late = 0.1 * compute + 0.1 * apply
    assert found.step_seconds[0] == pytest.approx(compute + copy + apply + late, rel=1e-4)
    assert found.samples_per_second[0] == pytest.approx(16 / found.step_seconds[0])
    assert found.staleness[0] == 0


def simulated_rate(alone: float, service: float, replicas: int) -> float:
    """Return the pushes a second of replicas that take turns at one shard: event by event."""
    ready = np.linspace(0, alone, replicas, endpoint=False)
    free, count = 0.0, 0
    while count < 4000 * replicas:
        first = int(ready.argmin())
        free = max(free, ready[first]) + service
        ready[first] = free + alone
        count += 1
    return count / free


@pytest.mark.parametrize(("service", "replicas"), [(0.01, 2), (0.01, 10), (0.1, 5), (0.1, 20), (0.5, 3), (0.02, 45)])
def test_queues_come_near_to_what_events_say(service, replicas):
    demand, one = np.array([[service]]), np.array([1.0])
    rate, _ = _queues(demand, one, np.zeros(1), np.array([replicas]), overlap=False)
    assert rate[0] == pytest.approx(simulated_rate(1.0, service, replicas), rel=0.2)


def test_overlap_hides_transfers_or_computing():
    demand, alone = np.array([[0.1]]), np.array([1.0])
    rate, _ = _queues(demand, alone, np.zeros(1), np.ones(1), overlap=True)
    assert rate[0] == pytest.approx(1.0)
    rate, _ = _queues(demand, alone, np.full(1, 3.0), np.ones(1), overlap=True)
    assert rate[0] == pytest.approx(1 / 3.1)


def ways_to_use() -> Candidates:
    choices = Choices(partitions=(1, 2, 4, 8), steps=((1, 1), (2, 2), (5, 5)))
    return enumerate_ways(choices, cluster())


@pytest.mark.parametrize("overlap", ["none", "threads"])
@pytest.mark.parametrize(
    ("change", "sign"),
    [("bandwidth", 1), ("latency", -1), ("rates", 1), ("updates", 1), ("copies", 1), ("spread", -1), ("step", -1)],
)
def test_what_is_better_makes_nothing_slower(overlap, change, sign):
    worse = planner(SPEECH, 440, server={"overlap": overlap})
    better, hardware = planner(SPEECH, 440, server={"overlap": overlap}), cluster()
    factor, known = 2.0**sign, worse.constants
    if change in ("bandwidth", "latency"):
        hardware = cluster(**{change: getattr(cluster(), change) * factor})
    elif change in ("rates", "updates"):
        faster = {
            name: tuple((*row[:-1], row[-1] * factor) for row in rows) for name, rows in getattr(known, change).items()
        }
        better.constants = known.model_copy(update={change: faster})
    elif change == "copies":
        better.constants = known.model_copy(update={"copies": tuple((a, b * factor) for a, b in known.copies)})
    else:
        name = "spread" if change == "spread" else "step_seconds"
        better.constants = known.model_copy(update={name: getattr(known, name) * factor})
    ways = ways_to_use()
    before, after = worse.predict(ways, cluster()), better.predict(ways, hardware)
    assert len(ways.partitions) > 100
    assert (after.samples_per_second >= before.samples_per_second * (1 - 1e-3)).all()
    assert (after.samples_per_second > before.samples_per_second * 1.001).any()


def test_a_rate_is_never_above_what_is_possible():
    one, ways = planner(SPEECH, 440), ways_to_use()
    found = one.predict(ways, cluster())
    alone = ways.replicas * one.demands.samples / (found.compute + found.exchange)
    assert (found.samples_per_second <= alone * (1 + 1e-9)).all()
    assert (found.busy <= 1 + 1e-6).all()
    assert (found.staleness >= 0).all()


def test_ways_fit_the_cluster():
    ways, hardware = ways_to_use(), cluster()
    assert (ways.nodes <= hardware.nodes).all()
    assert (ways.replicas >= 1).all()
    assert (
        len({tuple(row) for row in np.stack([ways.partitions, ways.replicas, ways.shards, ways.n_push]).T.tolist()})
        > 50
    )
    settled = enumerate_ways(Choices((2,), replicas=3, shards=2), hardware)
    assert set(settled.replicas.tolist()) == {3}
    assert set(settled.shards.tolist()) == {2}


def test_settings_that_are_given_stay():
    advice = planner(topology={"partitions": 2, "shards": 3}, optimizer={"n_push": 4}).advise(cluster())
    ways = advice.ways
    assert (int(ways.partitions[0]), int(ways.shards[0]), int(ways.n_push[0])) == (2, 3, 4)


def test_ten_thousand_nodes_take_seconds():
    began = time.process_time()
    one = planner(SPEECH, 440, max_staleness=200)
    advice = one.advise(cluster(nodes=10_000, cores=16))
    grown = one.over_nodes(cluster(nodes=10_000, cores=16), points=6)
    assert time.process_time() - began < 30
    assert float(advice.predictions.staleness[0]) <= 200
    rates = [each.samples_per_second for each in grown]
    assert len(rates) == 6
    assert all(later >= 0.85 * earlier for earlier, later in pairwise(rates))


def test_the_whole_model_needs_the_memory_of_its_layers():
    one = planner(SPEECH, 440, known=plain_machine(), optimizer={"rule": "adam"})
    found = one.predict(Candidates.one(1, 1, 1, ranks_of_node=1), cluster())
    size, samples = 41_777_152, one.demands.samples
    data = one.demands.data
    # Parameters and a gradient; inputs of four layers, the outputs of the last, and four buffers of that size.
    assert found.worker_bytes[0] == 4 * (2 * size + samples * (4 * 2560 + 8192 + 4 * 8192)) + data
    assert found.shard_bytes[0] >= 4 * 3 * size


def test_memory_that_cannot_hold_the_model_is_refused_with_numbers_that_would_do():
    one = planner(SPEECH, 440)
    with pytest.raises(UserError, match=r"41,777,152 parameters need .* --memory says .*GiB would do, or --nodes \d+"):
        one.advise(cluster(nodes=1, cores=2, memory=4e8))
    with pytest.raises(UserError, match="does not fit"):
        one.advise(cluster(nodes=1, memory=1e6))


def test_ranks_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"replicas = 100: needs 101 ranks, and 8 nodes"):
        planner(topology={"replicas": 100}).advise(cluster())


def test_a_staleness_that_cannot_be_kept_is_refused():
    with pytest.raises(UserError, match="lead to 3 at least"):
        planner(topology={"replicas": 4}, server={"gradients": "layers"}, max_staleness=2).advise(cluster())


def test_layers_of_a_users_own_are_refused():
    run = Run.model_validate({"network": {"layers": [{"type": "mine:Layer", "name": "own"}, {"units": 2}]}})
    with pytest.raises(UserError, match="layer 'own' is one of your own"):
        check_layers(run.network)


@pytest.mark.parametrize("setting", [{"method": "sandblaster"}, {"exchange": "synchronous"}])
def test_what_the_model_does_not_know_is_refused(setting):
    (name,) = setting
    with pytest.raises(UserError, match=f"optimizer.{name}.*cost model"):
        planner(optimizer=setting)


def test_constants_survive_a_file(tmp_path):
    known, path = constants.reference(), tmp_path / "machine.toml"
    path.write_text(constants.as_toml(known))
    read = constants.load(path)
    assert read.model_dump().keys() == known.model_dump().keys()
    assert read.rates["dense"][0] == pytest.approx(known.rates["dense"][0], rel=1e-3)
    assert constants.as_toml(read) == path.read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("= [", "not valid TOML"),
        ("\xff", "not valid TOML"),
        ("a = 1", "unknown key 'a'"),
        (None, "cannot be read: No such file"),
        ("x" * (1 << 21), "no file of dbmpi bench machine"),
    ],
)
def test_what_is_no_file_of_constants_is_refused(tmp_path, text, message):
    path = tmp_path / "machine.toml"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        constants.load(path)


@pytest.mark.parametrize(
    ("line", "wrong", "message"),
    [
        ("latency = ", "latency = -1.0", "latency"),
        ("spread = ", "spread = nan", "spread"),
        ("thread_gain = ", "thread_gain = 2.0", "thread_gain"),
        ("[rates]", "[other]", "rates"),
    ],
)
def test_wrong_constants_are_named(tmp_path, line, wrong, message):
    text = constants.as_toml(constants.reference()).splitlines()
    path = tmp_path / "machine.toml"
    path.write_text("\n".join(wrong if each.startswith(line) else each for each in text))
    with pytest.raises(UserError, match=message):
        constants.load(path)


CONFIGURATION = "[[network.layers]]\nunits = 64\nactivation = 'relu'\n[[network.layers]]\nunits = 10\n"
CLUSTER = ("--input-shape", "40", "--nodes", "8", "--cores", "4", "--memory", "8GiB")


def test_the_command_prints_a_plan_and_draws_it(tmp_path, capsys):
    path, picture = tmp_path / "run.toml", tmp_path / "plan.png"
    path.write_text(CONFIGURATION)
    assert main(["plan", str(path), *CLUSTER, "--bandwidth", "10Gbit/s", "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "not calibrated" in printed
    assert "topology.partitions=1" in printed
    assert picture.stat().st_size > 10_000
    assert main(["plan", str(path), *CLUSTER, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert f"topology.replicas={found['best']['replicas']}" in printed
    assert found["best"]["samples_per_second"] == pytest.approx(
        128 * found["best"]["replicas"] / found["best"]["step_seconds"]
    )
    assert [one["nodes_given"] for one in found["over_nodes"]][-1] == 8
    assert math.isfinite(found["best"]["staleness"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--memory", "8"), "expected a number and a unit"),
        (("--bandwidth=-1Gbit/s",), "more than 0"),
        (("--latency", "5 parsec"), "20 us"),
        (("--plot", "plan.txt"), "ends with .png"),
        (("--machine", "missing.toml"), "dbmpi bench machine --out missing.toml"),
    ],
)
def test_mistakes_in_arguments_end_with_exit_code_2(tmp_path, capsys, words, message):
    path = tmp_path / "run.toml"
    path.write_text(CONFIGURATION)
    assert main(["plan", str(path), *CLUSTER, *words]) == 2
    assert message in capsys.readouterr().err


def test_predictions_of_many_ways_are_those_of_each():
    one, ways, hardware = planner(SPEECH, 440), ways_to_use(), cluster()
    works = {number: one.work(number) for number in (1, 2, 4, 8)}
    together = predict(works, one.demands, one.constants, hardware, ways)
    for number in range(0, len(ways.partitions), 37):
        alone = predict(works, one.demands, one.constants, hardware, ways.chosen(np.array([number])))
        assert alone.samples_per_second[0] == pytest.approx(together.samples_per_second[number], rel=1e-5)
