"""The description of a run: what a configuration file may say, its defaults, and what each setting means.

A run is described by frozen, validated objects.  They are read from TOML with :func:`load`, changed with
``--set section.key=value``, built directly from Python, and written whole, defaults included, into every
checkpoint.  Nothing here imports MPI or NumPy.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import tomllib
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from dbmpi.errors import UserError

Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_\-]*$", max_length=64)]
# Strict: in a file that has types, true is no 1 and "5" is no 5.
Count = Annotated[int, Field(ge=1, strict=True)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError("must be odd, so that the window has a place in its middle")
    return value


Odd = Annotated[int, Field(ge=1, strict=True), AfterValidator(_odd)]


class Section(BaseModel):
    """A part of the description: frozen, and without room for keys that nobody reads."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class RunSection(Section):
    """Where the run lives, and its seed."""

    directory: Path = Path("runs/run")
    """Directory of the run: checkpoints, records and plots; made if missing."""
    seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)] = 1
    """Seed of the initial weights and of the order of the samples."""


class DataSection(Section):
    """What to learn from: HDF5 files made by ``dbmpi data import`` or by your own program."""

    train: Path
    """HDF5 file with the training samples."""
    test: Path | None = None
    """HDF5 file with the held-out samples, for the accuracy that is reported."""
    memory_mib: Count = 4096
    """A file up to this size (MiB, as float32) is kept in each worker's memory; a larger one is read batch by batch."""


class Dense(Section):
    """A fully connected layer: ``y = activation(W x + b)``."""

    type: Literal["dense"] = "dense"
    name: Name | None = None
    """Name in checkpoints; by default the type and the place, e.g. ``dense1``."""
    units: Count
    """Number of outputs."""
    activation: Literal["sigmoid", "tanh", "relu", "linear"] = "linear"
    """Function applied to every output."""
    initial_scale: NotNegative = 1.0
    """Factor on the standard deviation of the initial weights."""


class Local(Section):
    """A locally connected layer: a filter of its own at every place (not shared), valid borders."""

    type: Literal["local"] = "local"
    name: Name | None = None
    """Name in checkpoints; by default the type and the place, e.g. ``local1``."""
    maps: Count
    """Number of maps: filters at every place."""
    field: Count | tuple[Count, Count]
    """Rows and columns of the inputs that a filter sees; one number for a square."""
    stride: Count = 1
    """Rows, and columns, from one field to the next."""
    activation: Literal["sigmoid", "tanh", "relu", "linear"] = "linear"
    """Function applied to every output."""
    initial_scale: NotNegative = 1.0
    """Factor on the standard deviation of the initial weights."""
    reconstruction: NotNegative = 0.0
    """With the loss ``reconstruction``: weight of ``|x' - x|^2`` for inputs x and their estimate from the outputs."""


class Convolution(Section):
    """A convolution: the same filters at every place, valid borders."""

    type: Literal["convolution"] = "convolution"
    name: Name | None = None
    """Name in checkpoints; by default the type and the place, e.g. ``convolution1``."""
    maps: Count
    """Number of maps: filters."""
    field: Count | tuple[Count, Count]
    """Rows and columns of the inputs that a filter sees; one number for a square."""
    stride: Count = 1
    """Rows, and columns, from one field to the next."""
    activation: Literal["sigmoid", "tanh", "relu", "linear"] = "linear"
    """Function applied to every output."""
    initial_scale: NotNegative = 1.0
    """Factor on the standard deviation of the initial weights."""
    reconstruction: NotNegative = 0.0
    """With the loss ``reconstruction``: weight of ``|x' - x|^2`` for inputs x and their estimate from the outputs."""


class Pooling(Section):
    """Pooling: sums up each window of a map, valid borders; windows overlap where the stride is less than the size."""

    type: Literal["pooling"] = "pooling"
    name: Name | None = None
    """Name in messages; by default the type and the place, e.g. ``pooling2``."""
    kind: Literal["l2", "average", "max"] = "l2"
    """``l2``: root of the sum of squares; ``average``: mean; ``max``: maximum."""
    size: Count | tuple[Count, Count]
    """Rows and columns of a window; one number for a square."""
    stride: Count = 1
    """Rows, and columns, from one window to the next."""
    penalty: NotNegative = 0.0
    """With the loss ``reconstruction``: weight of the sum of the outputs (the paper's lambda is 0.1)."""


class Normalisation(Section):
    """Local contrast normalisation: subtracts a local mean over all maps, then divides by a local deviation."""

    type: Literal["normalisation"] = "normalisation"
    name: Name | None = None
    """Name in messages; by default the type and the place, e.g. ``normalisation3``."""
    window: Odd = 5
    """Rows and columns of the Gaussian window; odd."""
    floor: Positive = 0.01
    """Least local deviation to divide by."""


class Dropout(Section):
    """Dropout: while training, every value is zero with probability `rate` and otherwise scaled by 1 / (1 - rate)."""

    type: Literal["dropout"] = "dropout"
    name: Name | None = None
    """Name in messages, and a part of the masks' seed; by default the type and the place, e.g. ``dropout2``."""
    rate: Annotated[float, Field(ge=0, lt=1, strict=True)]
    """Probability that a value is dropped."""


class OwnLayer(Section):
    """A layer of your own: a class that fulfils the contract of a layer (see own-layers.md), with settings of its own.

    All keys but those below go to the class, which is called with the layer's name, the shape of its inputs, and them.
    """

    model_config = ConfigDict(extra="allow")

    type: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$", max_length=200)]
    """``module:Class``; the module is looked for in `network.code` first, then where Python finds modules."""
    name: Name | None = None
    """Name in checkpoints; by default the class and the place, e.g. ``maxout2``."""

    @property
    def settings(self) -> dict[str, Any]:
        """The keys that go to the class."""
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _settings_can_be_stored(self) -> OwnLayer:
        for key, value in self.settings.items():
            if not key.isidentifier() or key == "input_shape":
                raise ValueError(f"{key!r} cannot be the name of a setting; expected a word like 'units'")
            if not _is_plain(value):
                raise ValueError(
                    f"{key} = {_shown(value)}: expected numbers, texts, true, false, lists or tables of them"
                )
        return self


def _is_plain(value: Any) -> bool:
    """Whether a value can be stored as JSON and read back as what it was."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(below) for key, below in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


_OWN = "own layer"


def _type_of(layer: Any) -> Any:
    """Return which kind of layer a table describes; a dense one where it does not say."""
    kind = layer.get("type", "dense") if isinstance(layer, dict) else getattr(layer, "type", None)
    return _OWN if isinstance(kind, str) and ":" in kind else kind


LAYERS: tuple[type[Section], ...] = (Dense, Local, Convolution, Pooling, Normalisation, Dropout)
"""The kinds of layers that dbmpi brings along."""

BuiltInLayer = Dense | Local | Convolution | Pooling | Normalisation | Dropout
AnyLayer = Annotated[
    Annotated[Dense, Tag("dense")]
    | Annotated[Local, Tag("local")]
    | Annotated[Convolution, Tag("convolution")]
    | Annotated[Pooling, Tag("pooling")]
    | Annotated[Normalisation, Tag("normalisation")]
    | Annotated[Dropout, Tag("dropout")]
    | Annotated[OwnLayer, Tag(_OWN)],
    Discriminator(_type_of),
]


class NetworkSection(Section):
    """The model: layers from the input upwards, and the loss on top of the last one."""

    loss: Literal["softmax", "logistic", "squared", "reconstruction"] = "softmax"
    """``softmax``: cross-entropy over classes; ``logistic``: one-vs-all; ``squared``: half the squared distance;
    ``reconstruction``: no targets, but what layers say of themselves: their `reconstruction` and `penalty`."""
    layers: tuple[AnyLayer, ...]
    """The layers, each a ``[[network.layers]]`` table."""
    code: Path | None = None
    """Directory in which modules of your own layers are looked for first; by default that of the configuration."""

    @model_validator(mode="after")
    def _layers_fit(self) -> NetworkSection:
        if not self.layers:
            raise ValueError("a network needs at least one [[network.layers]] table")
        names = self.layer_names
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two layers are called {twice[0]!r}: give one of them another name")
        own = [name for name, layer in zip(names, self.layers, strict=True) if getattr(layer, "reconstruction", 0) > 0]
        own += [name for name, layer in zip(names, self.layers, strict=True) if getattr(layer, "penalty", 0) > 0]
        if (self.loss == "reconstruction") != bool(own):
            raise ValueError(
                f"layer {own[0]!r} has an objective of its own, which needs loss = 'reconstruction', not {self.loss!r}"
                if own
                else "loss = 'reconstruction' needs a layer with reconstruction > 0, e.g. one of type 'local'"
            )
        last = self.layers[-1]
        if self.loss == "reconstruction":
            return self
        if not isinstance(last, Dense):
            raise ValueError(
                f"the last layer must be of type 'dense', for its units are the outputs, not {last.type!r}"
            )
        if self.loss != "squared" and last.activation != "linear":
            raise ValueError(
                f"the loss {self.loss!r} contains the last activation: the last layer must be 'linear', "
                f"not {last.activation!r}"
            )
        return self

    @property
    def outputs(self) -> int:
        """Units of the last layer."""
        last = self.layers[-1]
        assert isinstance(last, Dense)
        return last.units

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The layers' names, given or by default."""
        return tuple(
            layer.name or f"{layer.type.rpartition(':')[2].lower()}{place}"
            for place, layer in enumerate(self.layers, 1)
        )


class TopologySection(Section):
    """How the ranks are used; one of the numbers may be left out and follows from the world's size."""

    shards: Count | None = None
    """Ranks that hold the parameters; by default 1."""
    replicas: Count | None = None
    """Instances of the model; by default as many as the ranks allow."""
    partitions: Count | None = None
    """Ranks that compute one replica together; by default 1."""
    colocate: bool = False
    """Put the shards on ranks that also work, instead of on ranks of their own."""


class PlacedLayer(Section):
    """How one layer is cut."""

    boxes: tuple[str, ...] | None = None
    """For each partition the outputs that it computes, a range for each axis: ``"0:8, :, 46:91"``; ``""`` for none."""
    split: Literal["outputs", "inputs"] | None = None
    """Whether the workers share its outputs, or its inputs and add up; by default what moves the fewest bytes."""


class PlacementSection(Section):
    """How a replica is cut over its partitions; without this section, so that little has to be exchanged."""

    weights: tuple[Positive, ...] | None = None
    """For each partition how fast its machine is; boxes are in proportion.  By default all are alike."""
    layers: dict[Name, PlacedLayer] = {}
    """A ``[placement.layers.NAME]`` table for each layer that is not to be cut automatically."""


class OptimizerSection(Section):
    """How the parameters are learned."""

    method: Literal["downpour", "sandblaster"] = "downpour"
    """``downpour``: asynchronous SGD over the parameter server (paper, section 4.1); ``sandblaster``: distributed batch
    optimisation (section 4.2), see ``[sandblaster]``."""
    rule: Literal["sgd", "adagrad"] = "adagrad"
    """The update that the shards apply."""
    learning_rate: Positive = 0.01
    """Rate of the rule; for ``adagrad`` the paper's gamma, about ten times the best fixed rate."""
    initial_accumulator: NotNegative = 0.0
    """Adagrad: what the sum of squared gradients starts from."""
    epsilon: NotNegative = 1e-10
    """Adagrad: added to the root of the sum, so that a gradient of zero gives a step of zero and not 0/0."""
    batch_size: Count = 128
    """Samples of one step of one replica."""
    epochs: Positive = 10.0
    """How often the training samples are passed through, all replicas together."""
    n_push: Count = 1
    """Push the accrued gradient every this many steps."""
    n_fetch: Count = 1
    """Fetch the parameters every this many steps."""
    local_rate: NotNegative = 0.0
    """Rate alpha of the replica's own steps between two fetches (algorithm 1.1); 0 takes none."""
    warmstart: Annotated[int, Field(ge=0, strict=True)] = 0
    """One replica takes this many steps alone before the others are released."""


class SandblasterSection(Section):
    """How ``optimizer.method = "sandblaster"`` works; the batch is cut into portions of ``optimizer.batch_size``."""

    algorithm: Literal["lbfgs", "conjugate_gradients", "gradient_descent"] = "lbfgs"
    """The batch method."""
    memory: Annotated[int, Field(ge=0, le=1000, strict=True)] = 10
    """L-BFGS: pairs of steps and gradient differences that are kept on the shards."""
    line_search: Literal["strong_wolfe", "backtracking"] = "strong_wolfe"
    """``strong_wolfe``: More and Thuente's; ``backtracking``: Armijo's condition alone."""
    l1: NotNegative = 0.0
    """Factor of the sum of magnitudes of all parameters, added to the loss (OWL-QN; L-BFGS only)."""
    l2: NotNegative = 0.0
    """Half of this times the sum of squares of all parameters is added to the loss."""
    gtol: NotNegative = 1e-5
    """Largest magnitude of the gradient at which the run ends."""
    ftol: NotNegative = 2.2e-9
    """Relative decrease of the loss in an iteration at which the run ends."""
    batch_portions: Annotated[int, Field(ge=0, strict=True)] = 0
    """Portions of a batch; 0 takes all training samples."""
    batch_iterations: Count = 10
    """Iterations on the same batch, where it is not all samples; the next ones take the next samples."""
    portions_per_push: Count = 4
    """Portions whose gradients a replica adds up before the shards take them."""
    deterministic: bool = False
    """Add up portions in their order, so that the result depends neither on timing nor on the number of replicas."""


class ServerSection(Section):
    """How gradients travel to the shards."""

    inbox_mib: Positive = 64.0
    """Memory (MiB) that each shard sets aside for incoming gradients, for all replicas together."""
    chunk_kib: Positive = 4096.0
    """Largest piece (KiB) in which a gradient is sent; smaller where many replicas share the inbox."""
    push: Literal["shared", "copied"] = "shared"
    """``shared``: shards read the gradients of workers on their host where they lie; ``copied``: all use the inbox."""
    fetch: Literal["copied", "shared"] = "copied"
    """``shared``: workers compute on the shards' own memory, which changes meanwhile; one host, one partition."""
    transport: Literal["auto", "rma", "p2p"] = "auto"
    """Between hosts, ``rma``: one-sided; ``p2p``: messages with the same results; ``auto``: what is faster at start."""
    consistent: bool = False
    """A fetch never sees a push half applied by a shard; it may have to wait for one to end."""
    overlap: Literal["none", "threads"] = "none"
    """``threads``: fetch, push and compute at the same time, as in the paper; ``none``: one after the other."""


class CheckpointSection(Section):
    """When to write the state of the run, and whether to go on from it."""

    every_seconds: NotNegative = 600.0
    """Time between two checkpoints; 0 writes only the last one."""
    keep: Count = 2
    """How many checkpoints stay; older ones are deleted after a newer one is whole."""
    resume: Literal["auto", "never"] = "never"
    """``auto``: go on from the latest checkpoint of the run directory, if there is one."""


class MonitorSection(Section):
    """What is reported while the run goes on."""

    report_seconds: Positive = 1.0
    """Time between two lines of each rank's records."""
    evaluate_epochs: NotNegative = 1.0
    """Epochs between two evaluations on the test data; 0 evaluates only at the end."""
    progress: Literal["auto", "bar", "lines", "none"] = "auto"
    """How progress is shown: a live bar on a terminal, lines elsewhere."""


class Run(Section):
    """The whole description of a run."""

    run: RunSection = RunSection()
    data: DataSection
    network: NetworkSection
    topology: TopologySection = TopologySection()
    placement: PlacementSection = PlacementSection()
    optimizer: OptimizerSection = OptimizerSection()
    sandblaster: SandblasterSection = SandblasterSection()
    server: ServerSection = ServerSection()
    checkpoint: CheckpointSection = CheckpointSection()
    monitor: MonitorSection = MonitorSection()

    @model_validator(mode="after")
    def _steps_fit_the_server(self) -> Run:
        if self.server.fetch == "shared" and self.server.consistent:
            raise ValueError(
                "server.consistent = true needs copies of the parameters, for the shards' own memory changes while a "
                'gradient is computed: set server.fetch = "copied", or server.consistent = false'
            )
        if self.server.fetch == "shared" and (self.optimizer.n_fetch > 1 or self.optimizer.local_rate):
            raise ValueError(
                'server.fetch = "shared" computes on the shards\' own memory, which is never of an earlier fetch and '
                "not the replica's to change: set optimizer.n_fetch = 1 and optimizer.local_rate = 0, or server.fetch "
                '= "copied"'
            )
        return self

    @model_validator(mode="after")
    def _method_fits(self) -> Run:
        sandblaster = self.sandblaster
        if sandblaster.l1 and sandblaster.algorithm != "lbfgs":
            raise ValueError(
                f"sandblaster.l1 = {sandblaster.l1:g} needs sandblaster.algorithm = 'lbfgs', not "
                f"{sandblaster.algorithm!r}"
            )
        if self.optimizer.method == "sandblaster" and self.optimizer.warmstart:
            raise ValueError(
                "optimizer.warmstart is for the method 'downpour'; to begin Sandblaster from parameters that Downpour "
                "has learned, go on from its checkpoint with checkpoint.resume = 'auto'"
            )
        if self.optimizer.method == "sandblaster" and self.server.transport == "p2p":
            raise ValueError(
                'server.transport = "p2p" has no atomic operations, which Sandblaster needs; set server.transport '
                'to "rma"'
            )
        if self.optimizer.method == "sandblaster" and sandblaster.l1 and sandblaster.batch_portions:
            raise ValueError("sandblaster.l1 goes with batches of all samples only: set sandblaster.batch_portions = 0")
        return self

    def to_json(self) -> str:
        """Return the effective description, defaults included, as JSON text."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str) -> Run:
        """Read what :meth:`to_json` wrote; raises UserError where it does not describe a run."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise UserError(explain(error, cls, "the stored description")) from None


def load(path: Path, overrides: tuple[str, ...] = ()) -> Run:
    """Read a run from a TOML file and apply ``section.key=value`` overrides.

    Relative paths of the ``[data]`` section, and that of `network.code`, are taken from the directory of the file, so
    that a configuration, its data and its layers can be moved together; the run directory is relative to the current
    directory.

    Raises
    ------
    UserError
        If the file cannot be read, is not TOML, or does not describe a run.
    """
    try:
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text)
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a configuration: {error}") from None
    except RecursionError:
        raise UserError(f"{path}: not valid TOML that can be read: its values are nested too deeply") from None
    except ValueError as error:  # TOMLDecodeError, or a number of too many digits
        raise UserError(f"{path}: not valid TOML: {error}") from None
    data = table.get("data")
    if isinstance(data, dict):
        for key in ("train", "test"):
            if isinstance(data.get(key), str):
                data[key] = os.path.normpath(path.parent / data[key])
    network = table.get("network")
    if isinstance(network, dict) and isinstance(network.get("code"), str):
        network["code"] = os.path.normpath(path.parent / network["code"])
    for override in overrides:
        _apply(table, override)
    try:
        run = Run.model_validate(table)
    except ValidationError as error:
        raise UserError(explain(error, Run, str(path))) from None
    if run.network.code is None and any(isinstance(layer, OwnLayer) for layer in run.network.layers):
        here = run.network.model_copy(update={"code": path.parent})
        return run.model_copy(update={"network": here})
    return run


def _apply(table: dict[str, Any], override: str) -> None:
    """Set one ``section.key=value`` in the table; the value is TOML, or else a plain string."""
    target, equals, text = override.partition("=")
    keys = target.strip().split(".")
    if not equals or len(keys) < 2 or not all(keys):
        raise UserError(f"--set {override}: expected section.key=value, e.g. --set optimizer.epochs=5")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text.strip()
    place: Any = table
    for key in keys[:-1]:
        place = _step(place, key, override)
    if isinstance(place, list):
        raise UserError(f"--set {override}: name a key of layer {keys[-1]}, e.g. network.layers.{keys[-1]}.units=100")
    place[keys[-1]] = value


def _step(place: Any, key: str, override: str) -> Any:
    """Go one level down; in a list of tables by number, counted from 0."""
    if isinstance(place, list):
        if key not in map(str, range(len(place))):
            raise UserError(f"--set {override}: {key!r} is not one of the {len(place)} entries 0 to {len(place) - 1}")
        below = place[int(key)]
    else:
        below = place.setdefault(key, {})
    if not isinstance(below, dict | list):
        raise UserError(f"--set {override}: {key!r} is a value and has no keys")
    return below


def explain(error: ValidationError, model: type[BaseModel], source: str) -> str:
    """Turn a validation error into lines that name the place, what was given and what was expected."""
    lines = []
    for problem in error.errors():
        place = _without_tags(problem["loc"])
        where = ".".join(str(part) for part in place)
        if problem["type"] == "extra_forbidden":
            known = _keys(model, place[:-1])
            near = difflib.get_close_matches(str(place[-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            lines.append(f"{source}: unknown key {where!r}; {hint}")
        elif problem["type"] == "union_tag_invalid":
            known = [str(kind.model_fields["type"].default) for kind in LAYERS]
            given = str(problem.get("ctx", {}).get("tag"))
            near = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
            others = f"known are {', '.join(known)}, and module:Class for a layer of your own"
            hint = f"did you mean {near[0]!r}?" if near else others
            lines.append(f"{source}: {where}.type: {given[:40]!r} is no type of layer; {hint}")
        elif problem["type"] == "missing":
            lines.append(f"{source}: {where!r} is missing: {_meaning(model, place)}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            given = "" if problem["type"] == "value_error" else f" (given: {_shown(problem['input'])})"
            lines.append(f"{source}: {where}: {message}{given}")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    """Return the beginning of a value as text."""
    try:
        return json.dumps(value, default=str)[:80]
    except (ValueError, RecursionError):
        return "a number or nesting too large to show"


def _without_tags(place: tuple[int | str, ...]) -> list[int | str]:
    """Return a place without the types of layers that pydantic puts behind their numbers."""
    return [part for before, part in zip((None, *place), place, strict=False) if not isinstance(before, int)]


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Return the models that an annotation contains, e.g. the layers of ``tuple[Dense, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, tuple, list, Annotated):
        return [model for part in get_args(annotation) for model in _models(part)]
    return []


def _descend(model: type[BaseModel], place: list[int | str]) -> list[type[BaseModel]]:
    """Return the models that may stand at a place in the description."""
    models = [model]
    for part in place:
        fields = [m.model_fields[str(part)] for m in models if str(part) in m.model_fields]
        if fields:
            models = [found for field in fields for found in _models(field.annotation)]
    return models


def _keys(model: type[BaseModel], place: list[int | str]) -> list[str]:
    return [name for found in _descend(model, place) for name in found.model_fields]


def _meaning(model: type[BaseModel], place: list[int | str]) -> str:
    """Return the documentation of a field, for the message that asks for it."""
    for found in _descend(model, place[:-1]):
        field = found.model_fields.get(str(place[-1]))
        if field is not None:
            return field.description or (f"a [{place[-1]}] table" if _models(field.annotation) else "a value")
    return "a value"
