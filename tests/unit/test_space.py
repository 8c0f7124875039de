"""Named vectors on one shard and on several, and the commands that reach them."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.sharded import Shards, cut_points

from dbmpi.methods.local_space import LocalSpace
from dbmpi.sandblaster import commands
from dbmpi.sandblaster.commands import OPERATIONS, Command, RemoteSpace, execute

DTYPES = [np.float32, np.float64]
PARTS = [1, 2, 3, 5]


def make(dtype=np.float64, size=1000, count=6, seed=0):
    random = np.random.default_rng(seed)
    return {f"v{number}": random.normal(size=size).astype(dtype) for number in range(count)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_operations_on_one_shard(dtype):
    v = make(dtype)
    a, b, c = (v[f"v{number}"].astype(np.float64) for number in range(3))
    space = LocalSpace(1000, dtype, vectors={name: vector.copy() for name, vector in v.items()})
    space.create("new")
    assert space.names == (*v, "new")
    np.testing.assert_array_equal(space.array("new"), np.zeros(1000))
    close = {"rtol": np.finfo(dtype).eps, "atol": 10 * np.finfo(dtype).eps}

    space.copy("v0", "new")
    np.testing.assert_array_equal(space.array("new"), v["v0"])
    space.scale("new", -2.5)
    np.testing.assert_allclose(space.array("new"), -2.5 * a, **close)
    space.axpy(0.1, "v1", "new")
    np.testing.assert_allclose(space.array("new"), -2.5 * a + 0.1 * b, **close)
    space.combine("new", [(2.0, "v0"), (3.0, "v1"), (-1.0, "v2")])
    np.testing.assert_allclose(space.array("new"), 2 * a + 3 * b - c, **close)
    space.multiply("v0", "v1", "new")
    np.testing.assert_allclose(space.array("new"), a * b, **close)
    space.copy("v0", "new")
    space.advance("new", "v5", 0.5, "v2")
    np.testing.assert_array_equal(space.array("v5"), v["v0"])
    np.testing.assert_allclose(space.array("new"), a + 0.5 * c, **close)

    products = space.dots([("v0", "v1"), ("v2", "v2")], ["v1"])
    np.testing.assert_allclose(products, [a @ b, c @ c, np.abs(b).max()], rtol=1e-12)
    np.testing.assert_array_equal(space.norms(["v0", "v1"]), [np.abs(a).max(), np.abs(b).max()])
    np.testing.assert_allclose(space.norms(["v0", "v1"], "one"), [np.abs(a).sum(), np.abs(b).sum()], rtol=1e-14)


def test_many_products_of_both_dtypes_at_once():
    single, double = make(np.float32, count=9, seed=1), make(np.float64, count=9, seed=2)
    vectors = {f"s{k}": v for k, v in enumerate(single.values())} | {f"d{k}": v for k, v in enumerate(double.values())}
    space = LocalSpace(1000, vectors=vectors)
    pairs = [(a, b) for a in vectors for b in vectors]
    expected = [vectors[a].astype(np.float64) @ vectors[b].astype(np.float64) for a, b in pairs]
    np.testing.assert_allclose(space.dots(pairs), expected, rtol=1e-12, atol=1e-12)


def test_vectors_keep_their_own_dtype():
    space = LocalSpace(3, np.float64)
    space.create("history", "float32")
    space.create("x")
    space.writable("x")[:] = np.pi
    space.copy("x", "history")
    assert space.array("history").dtype == np.float32
    np.testing.assert_array_equal(space.array("history"), np.float32([np.pi] * 3))
    with pytest.raises(ValueError, match="there already, as float32"):
        space.create("history")


def test_products_follow_vectors_that_are_written_from_outside():
    given = np.ones(100)
    space = LocalSpace(100, np.float64, vectors={"given": given})
    space.create("own")
    assert space.dots([("given", "given"), ("own", "own")]).tolist() == [100, 0]
    given[7] = 1e6  # far beyond what the space has seen
    space.writable("own")[3] = 1e9
    assert space.dots([("given", "given"), ("own", "own")], ["own"]).tolist() == [1e12 + 99, 1e18, 1e9]
    with pytest.raises(ValueError, match="read-only"):
        space.array("own")[0] = 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_products_of_what_is_not_finite(dtype, value):
    space = LocalSpace(50, dtype, vectors={"x": np.ones(50, dtype), "y": np.ones(50, dtype)})
    space.writable("x")[20] = value
    products = space.dots([("x", "y"), ("x", "x"), ("y", "y")], ["x"])
    np.testing.assert_array_equal(products, [np.nan, np.nan, 50, np.nan if np.isnan(value) else np.inf])
    np.testing.assert_array_equal(space.norms(["x", "y"], "one"), [np.nan, 50])


def test_vectors_scaled_against_one_another_are_summed_again():
    x = np.geomspace(1e-8, 1e8, 5000).astype(np.float32)
    reductions = []

    def reduce(values):
        reductions.append(values.size)
        return values

    space = LocalSpace(5000, reduce=reduce, vectors={"x": x, "y": 1 / x})
    expected = x.astype(np.float64) @ (1 / x).astype(np.float64)
    np.testing.assert_allclose(space.dots([("x", "y")]), [expected], rtol=1e-12)
    assert len(reductions) == 3  # the magnitudes of unknown vectors, the sum in one level, that in two


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("factor", "reductions"), [(1.0, 1), (10.0, 1), (1e-6, 1), (1e4, 2), (1e-30, 2), (np.nan, 2)])
def test_expectations_cost_at_most_another_reduction(dtype, factor, reductions):
    with Shards(np.ones(100, dtype), [30, 60]) as shards:
        shards.space.create("x")
        shards.scatter("x", np.full(100, 3, dtype))
        assert shards.space.dots([("x", "parameters")])[0] == 300
        changed = np.full(100, 3, dtype)
        changed[70] *= factor  # seen by the last shard alone
        shards.scatter("x", changed)
        before = shards.reductions
        products = shards.space.dots([("x", "parameters"), ("parameters", "parameters")], ["x"])
        assert shards.reductions - before <= reductions
        found = float(changed[70])
        largest = np.nan if np.isnan(found) else max(3, found)
        np.testing.assert_allclose(products, [297 + found, 100, largest], rtol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_vectors_that_shrink_or_grow_as_a_whole(dtype, factor):
    with Shards(np.ones(100, dtype), [30, 60]) as shards:
        shards.space.create("x")
        for scale in (1.0, factor, 1.0, factor**2):
            shards.scatter("x", np.full(100, scale, dtype))
            value = float(np.array(scale, dtype))
            assert shards.space.dots([("x", "x")])[0] == pytest.approx(100 * value**2, rel=1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [3, 1000, 70_000])
def test_scalars_have_the_same_bits_for_any_number_of_shards(dtype, size):
    random = np.random.default_rng(size)
    start = random.normal(size=size).astype(dtype)
    other = (random.normal(size=size) * 10.0 ** random.uniform(-5, 5, size)).astype(dtype)
    results = []
    for parts in PARTS:
        with Shards(start, cut_points(size, parts)) as shards:
            space = shards.space
            for name in ("x", "y", "z"):
                space.create(name)
            shards.scatter("x", other)
            space.combine("y", [(0.3, "x"), (-1.7, "parameters")])
            space.multiply("x", "y", "z")
            names = ["parameters", "x", "y", "z"]
            products = space.dots([(a, b) for a in names for b in names], names)
            before = shards.reductions
            np.testing.assert_array_equal(space.dots([(a, b) for a in names for b in names], names), products)
            assert shards.reductions == before + 1
            results.append(np.concatenate([products, space.norms(names), space.norms(names, "one")]))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@given(seed=st.integers(0, 2**32), cuts=st.lists(st.integers(0, 50), max_size=4))
@settings(max_examples=15)
def test_any_cut_gives_the_same_with_empty_shards_too(seed, cuts):
    start = np.random.default_rng(seed).normal(size=50)
    with Shards(start, []) as whole, Shards(start, sorted(cuts)) as parts:
        for shards in (whole, parts):
            shards.space.create("x")
            shards.space.combine("x", [(1 / 3, "parameters")])
        pairs = [("x", "parameters"), ("x", "x")]
        np.testing.assert_array_equal(whole.space.dots(pairs), parts.space.dots(pairs))


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda space: space.copy("x", "nowhere"), "no vector 'nowhere'; the vectors are: x, y"),
        (lambda space: space.dots([("x", "nowhere")]), "no vector 'nowhere'"),
        (lambda space: space.norms(["nowhere"]), "no vector 'nowhere'"),
        (lambda space: space.combine("x", []), "nothing to combine"),
        (lambda space: space.advance("x", "x", 1.0, "y"), "a vector of its own"),
        (lambda space: space.norms(["x"], "two"), "order 'max' or 'one'"),
        (lambda space: space.create("z", "int32"), "float32 or float64"),
    ],
)
def test_mistakes_are_named(operation, message):
    space = LocalSpace(4, vectors={"x": np.ones(4, np.float32), "y": np.ones(4, np.float32)})
    with pytest.raises(ValueError, match=message):
        operation(space)


@pytest.mark.parametrize(
    "vector", [np.ones(5, np.float32), np.ones(8, np.float32)[::2], np.ones(4, np.int32), np.ones((2, 2), np.float32)]
)
def test_vectors_that_do_not_fit_are_refused(vector):
    with pytest.raises(ValueError, match=r"float32|contiguous"):
        LocalSpace(4, vectors={"x": vector})


NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=commands.LONGEST_NAME)
NUMBERS = st.floats(allow_nan=False)


FORMS = {
    "create": (NAMES, st.sampled_from([None, "float32", "float64"])),
    "combine": (NAMES, st.lists(st.tuples(NUMBERS, NAMES), min_size=1, max_size=25).map(tuple)),
    "dots": (st.lists(st.tuples(NAMES, NAMES), max_size=45).map(tuple), st.lists(NAMES, max_size=3).map(tuple)),
    "norms": (st.lists(NAMES, max_size=9).map(tuple), st.sampled_from(["max", "one"])),
    "accrue": (NAMES, st.integers(0, 9), st.integers(0, 2**40)),
    "snapshot": (
        st.integers(0, 2**40),
        st.integers(0, 2**32 - 1),
        st.lists(NAMES, max_size=30).map(tuple),
        st.booleans(),
    ),
    "meet": (),
    "end": (),
    "copy": (NAMES, NAMES),
    "align": (NAMES, NAMES),
    "scale": (NAMES, NUMBERS),
    "axpy": (NUMBERS, NAMES, NAMES),
    "advance": (NAMES, NAMES, NUMBERS, NAMES),
    "pseudo_gradient": (NAMES, NAMES, NUMBERS, NAMES),
    "multiply": (NAMES, NAMES, NAMES),
    "project": (NAMES, NAMES, NAMES),
}


@st.composite
def some_command(draw):
    operation = draw(st.sampled_from(sorted(OPERATIONS)))
    return Command(operation, draw(st.tuples(*FORMS[operation])))


@given(command=some_command())
def test_commands_survive_the_journey(command):
    assert Command.decode(command.encode()) == command


@given(command=some_command(), data=st.data())
@settings(max_examples=300)
def test_damaged_commands_are_refused_or_are_commands(command, data):
    whole = command.encode()
    place = data.draw(st.integers(0, len(whole) - 1))
    damaged = bytearray(whole)
    damaged[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([bytes(damaged), whole[:place], whole + b"x", bytes(damaged[:place])]))
    try:
        read = Command.decode(cut)
    except ValueError:
        return
    assert read.encode() == cut  # whatever is accepted means one thing


@given(data=st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(data):
    for start in (b"", b'["copy",["x",'):
        with pytest.raises(ValueError, match="command"):
            Command.decode(start + data)


@pytest.mark.parametrize(
    "command",
    [
        Command("destroy", ("x",)),
        Command("writable", ("x",)),
        Command("__init__", ()),
        Command("copy", ("x",)),
        Command("copy", ("x", "y", 1.0)),
        Command("copy", ("x", "y" * 65)),
        Command("copy", ("x", "")),
        Command("copy", ("x", "y\n")),
        Command("copy", ("x", "ÿ")),
        Command("copy", ("x", 7)),
        Command("scale", ("x", "y")),
        Command("dots", (("x", "y"), ())),
        Command("dots", ((("x", "y", "x"),), ())),
        Command("norms", (("x",), "two")),
        Command("norms", ("x", "max")),
        Command("combine", ("x", ())),
        Command("create", ("x", "y")),
        Command("accrue", ("x", -1, 0)),
        Command("accrue", ("x", 0.5, 0)),
    ],
)
def test_senseless_commands_are_neither_sent_nor_executed(command):
    space = LocalSpace(4, vectors={"x": np.ones(4, np.float32), "y": np.zeros(4, np.float32)})
    with pytest.raises(ValueError, match="operation"):
        command.encode()
    with pytest.raises(ValueError, match="operation"):
        execute(space, command)
    np.testing.assert_array_equal(space.array("x"), np.ones(4))


def test_only_what_is_written_is_read():
    """The same command in other words is none."""
    assert Command("scale", ("x", 2)).encode() == b'["scale",["x",2.0]]'
    for other in (
        b'["scale",["x",2]]',
        b'["scale", ["x",2.0]]',
        b'["scale",["x","2.0"]]',
        b'["sc\\u0061le",["x",2.0]]',
    ):
        with pytest.raises(ValueError, match="not a command as it is written"):
            Command.decode(other)


def test_operations_of_a_run_need_its_shards():
    with pytest.raises(ValueError, match="'meet' is only for the shards of a run"):
        execute(LocalSpace(4), Command("meet", ()))


def test_remote_operations_arrive_as_they_were_meant():
    vectors = make(count=4)
    local = LocalSpace(1000, np.float64, vectors={name: vector.copy() for name, vector in vectors.items()})
    mirror = LocalSpace(1000, np.float64, vectors={name: vector.copy() for name, vector in vectors.items()})
    remote = RemoteSpace(lambda command: execute(mirror, Command.decode(command.encode())), vectors)
    results = []
    for space in (local, remote):
        space.create("w")
        space.create("h", "float32")
        space.copy("v0", "w")
        space.scale("w", 1.5)
        space.axpy(-0.3, "v1", "w")
        space.combine("h", [(0.5, "w"), (0.25, "v2")])
        space.multiply("w", "v3", "v3")
        space.advance("w", "v0", 0.1, "v1")
        space.pseudo_gradient("v1", "v2", 0.5, "v3")
        space.align("v1", "v2")
        space.project("v0", "w", "v2")
        names = list(space.names)
        its = [space.dots(list(pairwise(names)), names), space.norms(names), space.norms(names, "one")]
        results.append((names, np.concatenate(its)))
    assert results[0][0] == results[1][0] == [*vectors, "w", "h"]
    np.testing.assert_array_equal(results[0][1], results[1][1])
    for name in results[0][0]:
        np.testing.assert_array_equal(local.array(name), mirror.array(name))
    assert {"create", "dots", "norms"} < set(OPERATIONS)
