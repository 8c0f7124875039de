"""Descriptions of runs: every mistake is a message that names its place, and nothing else ever comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from dbmpi import config
from dbmpi.config import Run, load
from dbmpi.config.reading import read
from dbmpi.errors import UserError

SMALLEST = """
[data]
train = "train.h5"

[[network.layers]]
units = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(SMALLEST)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as raised:
        read(path, overrides)
    return str(raised.value)


# What is right


def test_the_smallest_description_has_defaults_for_the_rest(file: Path) -> None:
    run = load(file)
    assert run.data.train == file.parent / "train.h5"
    assert run.network.layer_names == ("dense1",)
    assert (run.optimizer.n_push, run.optimizer.n_fetch, run.checkpoint.resume) == (1, 1, "never")


def test_the_examples_are_right() -> None:
    examples = sorted((Path(__file__).parents[2] / "examples").glob("*.toml"))
    assert examples
    for example in examples:
        load(example)


@pytest.mark.parametrize("other", ["optimizer.n_fetch=2", "optimizer.local_rate=0.1"])
def test_the_shards_own_memory_cannot_be_old_or_walked_on(file: Path, other: str) -> None:
    assert load(file, ("server.fetch=shared",)).server.fetch == "shared"
    with pytest.raises(UserError, match=r"set optimizer.n_fetch = 1 and optimizer.local_rate = 0"):
        load(file, ("server.fetch=shared", other))
    with pytest.raises(UserError, match=r"server.consistent = true needs copies"):
        load(file, ("server.fetch=shared", "server.consistent=true"))


@pytest.mark.parametrize("shards", [(), ("topology.shards=1",)])
def test_a_mirror_needs_another_shard_and_downpour(file: Path, shards: tuple[str, ...]) -> None:
    with pytest.raises(
        UserError, match=r"server\.mirror = 10 needs another shard .* set topology\.shards to 2 or more"
    ):
        load(file, ("server.mirror=10", *shards))
    assert load(file, ("server.mirror=10", "topology.shards=2")).server.mirror == 10
    with pytest.raises(UserError, match=r"server\.mirror = 10 is for Downpour"):
        load(file, ("server.mirror=10", "topology.shards=2", "optimizer.method=sandblaster"))


def test_batch_methods_round_nothing_on_the_wire(file: Path) -> None:
    assert load(file, ("server.wire=bfloat16",)).server.wire == "bfloat16"
    with pytest.raises(UserError, match=r'server\.wire = "bfloat16" is for Downpour: .* set server\.wire = "float32"'):
        load(file, ("server.wire=bfloat16", "optimizer.method=sandblaster"))


@pytest.mark.parametrize("other", ["optimizer.n_push=2", "optimizer.local_rate=0.1", "server.consistent=true"])
def test_gradients_that_leave_by_layers_cannot_be_kept(file: Path, other: str) -> None:
    assert load(file, ("server.gradients=layers", "optimizer.n_fetch=2")).server.gradients == "layers"
    with pytest.raises(UserError, match=r'server\.gradients = "whole"'):
        load(file, ("server.gradients=layers", other))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rule=adamax"], ["'adamax' is no update rule", "adamw", "module:function"]),
        (["rule=adam", "nesterov=true"], ["nesterov = true needs optimizer.rule = 'momentum', not 'adam'"]),
        (["rule=my:rule", "weight_decay=0.1"], ["goes with the rules of dbmpi, not with 'my:rule'", "add it to"]),
        (["settings={beta=0.1}"], ["goes with a rule of your own, module:function, not 'adagrad'"]),
        (["decay_epochs=3"], ["decay_epochs = 3 needs a schedule", "'step', 'cosine' or 'inverse_root'"]),
        (["schedule=step"], ["'step' needs optimizer.decay_epochs"]),
        (["schedule=inverse_root"], ["'inverse_root' needs optimizer.decay_epochs", "or a warm-up"]),
        (["schedule=cosine", "warmup_epochs=10"], ["warmup_epochs = 10 leaves nothing of optimizer.epochs = 10"]),
    ],
)
def test_settings_of_rules_that_do_not_go_together(file: Path, overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        load(file, tuple(f"optimizer.{override}" for override in overrides))
    assert all(word in str(refused.value) for word in words), refused.value


def test_the_whole_gradient_is_clipped(file: Path) -> None:
    with pytest.raises(UserError, match=r'clip_norm needs the norm of the whole .*server.gradients = "whole"'):
        load(file, ("server.gradients=layers", "optimizer.clip_norm=1"))


def test_defaults_of_rules_differ_and_are_stored(file: Path) -> None:
    settings = {name: load(file, (f"optimizer.rule={name}",)) for name in ("adagrad", "rmsprop", "adam")}
    found = {name: (run.optimizer.epsilon, run.optimizer.beta2) for name, run in settings.items()}
    assert found == {"adagrad": (1e-10, 0.999), "rmsprop": (1e-8, 0.99), "adam": (1e-8, 0.999)}
    run = load(file, ("optimizer.rule=adam", "optimizer.epsilon=0.5"))
    assert Run.from_json(run.to_json()) == run
    assert run.optimizer.epsilon == 0.5


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["algorithm=newton"], ["'newton' is no batch method", "lbfgs", "module:function"]),
        (["algorithm=mine:method", "batch_portions=2"], ["'mine:method' goes with batches of all samples only"]),
        (["l1=0.1", "algorithm=gradient_descent"], ["l1 = 0.1 needs sandblaster.algorithm = 'lbfgs', not 'gradient_"]),
        (["l1=0.1", "batch_portions=4"], ["set sandblaster.batch_portions = 0"]),
        (
            ["batch_overlap=2", "batch_portions=3"],
            ["batch_portions of at least 4, not 3", "batch_iterations = 1, not 10"],
        ),
        (["batch_overlap=2", "line_search=strong_wolfe"], ["line_search = 'fixed', not 'strong_wolfe'"]),
        (["memory=-1"], ["sandblaster.memory: ", "(given: -1)"]),
    ],
)
def test_settings_of_sandblaster_that_do_not_go_together(file: Path, overrides: list[str], words: list[str]) -> None:
    given = ("optimizer.method=sandblaster", *(f"sandblaster.{override}" for override in overrides))
    with pytest.raises(UserError) as refused:
        load(file, given)
    assert "--set sandblaster." in str(refused.value)
    assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.parametrize("given", ["0", '"x"', "2.5", "[0, 3]", "[3]", '[3, "a"]', "[1, 2, 3]"])
def test_a_number_or_two_are_asked_for_once(file: Path, given: str) -> None:
    message = refusal(file, f'network.layers=[{{type="local", maps=2, field={given}}}, {{units=2}}]')
    assert message.startswith("--set network.layers=[")
    assert ("network.layers.0.field (layer 'local1'): expected a whole number of at least 1, or two of them") in message
    assert message.endswith(f"(given: {given})")


def test_data_lie_beside_the_description_and_the_run_where_it_is_started(file: Path) -> None:
    file.write_text(SMALLEST.replace('"train.h5"', '"../data/train.h5"\ntest = "/elsewhere/test.h5"'))
    run = load(file, ("run.directory=here",))
    assert run.data.train == file.parent.parent / "data" / "train.h5"
    assert run.data.test == Path("/elsewhere/test.h5")
    assert run.run.directory == Path("here")
    assert load(file, ("data.train=other.h5",)).data.train == Path("other.h5")


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("optimizer.epochs=2.5", ("optimizer", "epochs"), 2.5),
        ("optimizer.epochs = 5", ("optimizer", "epochs"), 5.0),
        ("optimizer.rule=sgd", ("optimizer", "rule"), "sgd"),
        ('optimizer.rule="sgd"', ("optimizer", "rule"), "sgd"),
        ("topology.colocate=true", ("topology", "colocate"), True),
        ("run.directory=a=b c", ("run", "directory"), Path("a=b c")),
        ("network.layers.0.units=9", ("network", "layers", 0, "units"), 9),
        ("network.layers.0.activation=linear", ("network", "layers", 0, "activation"), "linear"),
        ('network.layers=[{units=4, activation="tanh"}, {units=2}]', ("network", "layers", 1, "units"), 2),
    ],
)
def test_overrides_replace_single_settings(file: Path, override: str, place: tuple[Any, ...], value: object) -> None:
    found: Any = load(file, (override,))
    for part in place:
        found = found[part] if isinstance(part, int) else getattr(found, part)
    assert found == value
    assert type(found) is type(value) or isinstance(found, Path)


def test_the_last_override_counts(file: Path) -> None:
    assert load(file, ("run.seed=2", "run.seed=3")).run.seed == 3


def test_a_description_is_frozen(file: Path) -> None:
    with pytest.raises(ValidationError):
        load(file).optimizer.epochs = 3  # type: ignore[misc]


# What is wrong


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            {"optimizer": {"learning_rat": 1.0}},
            "Run: unknown key 'optimizer.learning_rat'; did you mean 'learning_rate'?",
        ),
        ({"network": {"layers": [{"units": 0}]}}, "Run: network.layers.0.units (layer 'dense1'): "),
        ({"optimizer": {"method": "sandblaster", "warmstart": 3}}, "Run: optimizer.warmstart is for the method"),
        ({"nothing": 3}, "Run: unknown key 'nothing'"),
    ],
)
def test_mistakes_in_python_are_told_as_those_in_a_file(values: dict[str, Any], told: str) -> None:
    whole = {"data": {"train": "train.h5"}, "network": {"layers": [{"units": 3}]}}
    with pytest.raises(UserError) as raised:
        Run(**whole | values)
    assert told in str(raised.value)
    assert "pydantic" not in str(raised.value)


def test_a_mistake_in_a_part_made_in_python_is_told_once() -> None:
    with pytest.raises(UserError, match=r"^Dense: units: .*\(given: 0\)$"):
        Run(data={"train": "x.h5"}, network=config.NetworkSection(layers=(config.Dense(units=0),)))


def fields() -> list[tuple[str, str]]:
    """Return every section and key of the description."""
    return [
        (name, key)
        for name, field in Run.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        for key in field.annotation.model_fields
    ]


@pytest.mark.parametrize(("section", "key"), fields())
def test_a_misspelled_key_is_told_the_right_one(file: Path, section: str, key: str) -> None:
    for wrong in (key + "x", key[:-1] + "_" + key[-1], key.upper()):
        message = refusal(file, f"{section}.{wrong}=1")
        assert f"unknown key '{section}.{wrong}'" in message
        assert f"did you mean '{key}'?" in message or wrong.isupper()
        assert message.startswith(f"--set {section}.{wrong}=1: ")


def test_a_key_like_no_other_is_told_them_all(file: Path) -> None:
    message = refusal(file, "run.qqqq=1")
    assert "known are directory, seed" in message


def test_misspelled_sections_and_keys_of_layers_are_told_the_right_one(file: Path) -> None:
    assert "did you mean 'optimizer'?" in refusal(file, "optimiser.epochs=1")
    assert "unknown key 'network.layers.0.unit' (layer 'dense1'); did you mean 'units'?" in refusal(
        file, "network.layers.0.unit=1"
    )
    assert "did you mean 'dense'?" in refusal(file, "network.layers.0.type=dens")
    # The keys of its own type alone.
    dropout = refusal(file, 'network.layers=[{type="dropout", rate=0.5, chance=0.5}, {units=2}]')
    assert dropout.endswith("'network.layers.0.chance' (layer 'dropout1'); known are type, name, rate")
    missing = refusal(file, 'network.layers=[{units=2}, {type="local", name="stage", field=3}, {units=2}]')
    assert "'network.layers.1.maps' (layer 'stage') is missing: Number of maps" in missing
    assert "did you mean 'boxes'?" in refusal(file, "placement.layers.dense1.box=[]")


def test_what_is_expected_is_said_in_words_of_toml(file: Path) -> None:
    for setting, expected in {
        'network.layers=["dense"]': "network.layers.0: expected a [[network.layers]] table",
        "network.layers=5": "network.layers: expected a list",
        "placement.weights=5": "placement.weights: expected a list",
        "placement.layers=5": "placement.layers: expected a table",
    }.items():
        assert expected in refusal(file, setting)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("run.seed", ["-1", "9223372036854775808", "1.5", "true", '"5"', "soon"]),
        ("run.directory", ["5", "true", "[]"]),
        ("data.train", ["5", "[]", "1.5"]),
        ("data.memory_mib", ["0", "-1", "true", "lots", '"64"']),
        ("network.loss", ["hinge", "5", "true"]),
        ("network.layers", ["[]", "5", "[5]", "{}"]),
        ("network.layers.0.units", ["0", "-3", "2.5", "true", '"3"', "[]", "{}", "1979-05-27", "1" + "0" * 5000]),
        ("network.layers.0.activation", ["sigmoidal", "1", '""']),
        ("network.layers.0.name", ["a/b", '""', "1x", "x" * 65, "5"]),
        ("network.layers.0.initial_scale", ["-1", "nan", "inf", "true"]),
        ("topology.shards", ["0", "-1", "1.5", "true", '"2"']),
        ("topology.replicas", ["0", "many"]),
        ("topology.partitions", ["0", "2.5"]),
        ("topology.colocate", ["maybe", "2", "[]"]),
        ("optimizer.method", ["upour", "1"]),
        ("optimizer.rule", ["adamax", "[]", "mine:", ":rule"]),
        ("optimizer.momentum", ["1", "-0.1", "nan"]),
        ("optimizer.nesterov", ["1", '"yes"']),
        ("optimizer.beta1", ["1.0", "-1"]),
        ("optimizer.beta2", ["1.0", "inf"]),
        ("optimizer.weight_decay", ["-1", "nan", "true"]),
        ("optimizer.schedule", ["linear", "1"]),
        ("optimizer.warmup_epochs", ["-1", "inf"]),
        ("optimizer.decay_epochs", ["0", "-1", "nan"]),
        ("optimizer.decay_factor", ["-0.1", "1.1"]),
        ("optimizer.clip_norm", ["-1", "nan", "inf"]),
        ("optimizer.settings", ["5", "{a = 'b'}", "{a = inf}"]),
        ("optimizer.learning_rate", ["0", "-1", "nan", "inf", "fast", "true", '"0.1"']),
        ("optimizer.initial_accumulator", ["-1", "nan"]),
        ("optimizer.epsilon", ["-1e-9", "inf"]),
        ("optimizer.batch_size", ["0", "1.5", "true"]),
        ("optimizer.epochs", ["0", "-2", "nan", "inf", "true"]),
        ("optimizer.n_push", ["0", "0.5"]),
        ("optimizer.n_fetch", ["0", "-1"]),
        ("optimizer.local_rate", ["-1", "nan"]),
        ("optimizer.warmstart", ["-1", "1.5", "true"]),
        ("placement.weights", ["[1, 0]", "[1, -2]", "1"]),
        ("server.inbox_mib", ["0", "-1", "nan"]),
        ("server.chunk_kib", ["0", "inf"]),
        ("server.push", ["rma", "true"]),
        ("server.transport", ["tcp", "2"]),
        ("server.overlap", ["all", "true"]),
        ("server.consistent", ["maybe", "2"]),
        ("server.fetch", ["none", "1"]),
        ("checkpoint.every_seconds", ["-1", "nan", "true"]),
        ("checkpoint.keep", ["0", "1.5"]),
        ("checkpoint.resume", ["yes", "true"]),
        ("monitor.report_seconds", ["0", "-1"]),
        ("monitor.evaluate_epochs", ["-1", "nan"]),
        ("monitor.progress", ["loud", "0"]),
    ],
)
def test_a_wrong_value_is_told_with_its_place(file: Path, key: str, values: list[str]) -> None:
    for value in values:
        message = refusal(file, f"{key}={value}")
        assert f"--set {key}={value}"[:80] in message
        assert key in message
        assert len(message) < 1000


def test_the_value_that_was_given_is_shown(file: Path) -> None:
    assert "(given: -3)" in refusal(file, "network.layers.0.units=-3")
    assert '(given: "hinge")' in refusal(file, "network.loss=hinge")


def test_what_is_missing_is_explained(file: Path) -> None:
    file.write_text("[network]\n")
    message = refusal(file)
    assert "'network.layers' is missing" in message


def test_an_objective_may_be_given_later(file: Path) -> None:
    file.write_text('[data]\ntrain = "train.h5"\n')
    assert load(file).network.layers == ()
    assert "'network.layers' is missing" in refusal(file)


def test_networks_that_make_no_sense_are_explained(file: Path) -> None:
    twice = 'network.layers=[{name="a", units=4}, {name="a", units=2}]'
    assert "two layers are called 'a'" in refusal(file, twice)
    assert "the last layer must be 'linear'" in refusal(file, "network.layers.0.activation=tanh")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("", "expected section.key=value"),
        ("optimizer", "expected section.key=value"),
        ("epochs=5", "expected section.key=value"),
        ("optimizer.=5", "expected section.key=value"),
        ("=5", "expected section.key=value"),
        ("optimizer.epochs.x=5", "'epochs' is a value and has no keys"),
        ("network.layers.1.units=5", "'1' is not one of the 1 entries"),
        ("network.layers.first.units=5", "'first' is not one of the 1 entries"),
        ("network.layers.\N{SUPERSCRIPT TWO}.units=5", "is not one of the 1 entries"),
        ("network.layers.0=5", "name a key of layer 0"),
    ],
)
def test_overrides_that_name_nothing_are_refused(file: Path, override: str, words: str) -> None:
    file.write_text(SMALLEST + "\n[optimizer]\nepochs = 1\n")
    assert words in refusal(file, override)


def test_overrides_of_what_is_no_table_are_refused(file: Path) -> None:
    file.write_text('data = 5\nnetwork = {layers = [5, "x"]}\n')
    for override in ("data.train=x", "network.layers.0.units=5", "network.layers.1.units=5"):
        refusal(file, override)


def test_a_file_may_be_named_by_a_text(file: Path) -> None:
    assert load(str(file)) == load(file)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    assert "no such configuration file" in refusal(tmp_path / "absent.toml")
    assert str(tmp_path) in refusal(tmp_path)
    bad = tmp_path / "bad.toml"
    for content, words in (
        (b"\xff\xfe", "cannot be read"),
        (b"[data\n", "not valid TOML"),
        (b"a = " + b"[" * 20_000, "TOML"),
        (b"a = " + b"{a=" * 20_000, "TOML"),
        (b"a = " + b"1" * 10_000, "TOML"),
    ):
        bad.write_bytes(content)
        message = refusal(bad)
        assert words in message
        assert str(bad) in message
        assert len(message) < 1000


# There and back


counts = st.integers(1, 10**6)
positive = st.floats(1e-30, 1e30)
not_negative = st.floats(0, 1e30)
names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_\-]{0,20}", fullmatch=True)
layer = st.fixed_dictionaries(
    {"units": counts},
    optional={"name": names, "activation": st.sampled_from(["sigmoid", "tanh", "relu"]), "initial_scale": not_negative},
)
descriptions = st.fixed_dictionaries(
    {
        "data": st.fixed_dictionaries({"train": st.text("abc/. \u00e9", min_size=1)}, optional={"memory_mib": counts}),
        "network": st.fixed_dictionaries(
            {"layers": st.lists(layer, max_size=4).map(lambda layers: [*layers, {"units": 2}])},
            optional={"loss": st.sampled_from(["softmax", "logistic", "squared"])},
        ),
    },
    optional={
        "run": st.fixed_dictionaries({}, optional={"seed": st.integers(0, 2**63 - 1)}),
        "topology": st.fixed_dictionaries({}, optional={"shards": counts, "colocate": st.booleans()}),
        "optimizer": st.fixed_dictionaries(
            {}, optional={"learning_rate": positive, "epochs": positive, "epsilon": not_negative, "n_push": counts}
        ),
    },
)


@given(descriptions)
def test_a_stored_description_reads_as_it_was(description: dict[str, Any]) -> None:
    try:
        run = Run.model_validate(description)
    except ValidationError:
        layers = description["network"]["layers"]
        assert len({layer.get("name") for layer in layers if "name" in layer}) < len(layers)
        return
    assert Run.from_json(run.to_json()) == run
    assert json.loads(run.to_json())["optimizer"]["n_fetch"] == 1  # defaults included


@given(st.text() | st.binary().map(repr) | st.recursive(st.none() | st.integers(), st.lists).map(json.dumps))
def test_a_stored_description_that_is_none_is_a_message(text: str) -> None:
    with pytest.raises(UserError, match="stored description"):
        Run.from_json(text)


# Garbage


def toml(value: Any) -> str:
    """Write a value as TOML, more or less."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value) if isinstance(value, str) else repr(value)


KEYS = [*Run.model_fields, *(key for _, key in fields()), "type", "units", "activation", "name", "", "x"]
scalars = st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["dense", "tanh", "sgd"])
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
)
tables = st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), values, max_size=6)


def assert_read_or_refused(path: Path, overrides: tuple[str, ...] = ()) -> None:
    try:
        read = load(path, overrides)
    except UserError:
        return
    assert isinstance(read, Run)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.binary() | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_garbage_gives_a_message_and_nothing_else(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    assert_read_or_refused(file)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=300)
@given(tables)
@pytest.mark.slow
def test_tables_of_anything_give_a_message_and_nothing_else(file: Path, table: dict[str, Any]) -> None:
    file.write_text("\n".join(f"{json.dumps(key)} = {toml(value)}" for key, value in table.items()))
    assert_read_or_refused(file)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=300)
@given(
    path=st.lists(st.sampled_from([*KEYS, "0", "1", "-1"]) | st.text(max_size=4), max_size=5),
    value=values.map(toml) | st.text(max_size=20),
)
def test_overrides_of_anything_give_a_message_and_nothing_else(file: Path, path: list[str], value: str) -> None:
    assert_read_or_refused(file, (f"{'.'.join(path)}={value}",))


def test_reading_a_description_imports_neither_numpy_nor_mpi() -> None:
    assert "numpy" not in vars(config)
