"""The sections of a run, and the run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from dbmpi.config import exchange, staleness
from dbmpi.config.checkpoint import CheckpointSection
from dbmpi.config.data import DataSection
from dbmpi.config.layers import OWN
from dbmpi.config.local import LocalSection
from dbmpi.config.messages import explain
from dbmpi.config.monitor import MonitorSection, mistake_in_metric
from dbmpi.config.network import NetworkSection, ObjectiveSection
from dbmpi.config.optimizer import OptimizerSection
from dbmpi.config.server import ServerSection
from dbmpi.config.simulation import SimulationSection
from dbmpi.config.values import Count, CountOrNone, Name, NotNegative, Positive, PossiblePath, Section
from dbmpi.errors import UserError


class RunSection(Section):
    """Directory and seed of the run."""

    directory: PossiblePath = Path("runs/run")
    """Directory of the run: checkpoints, records and plots; made if missing."""
    seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)] = 1
    """Seed of the initial weights and of the order of the samples."""
    initial: PossiblePath | None = None
    """First values of the parameters by name: an ``.npz`` or ``.safetensors`` file, a checkpoint, or the directory of
    another run.  A run that resumes goes on from its own checkpoint instead."""
    initial_names: Literal["all", "some"] = "all"
    """``all``: the file must have just the names of the model; ``some``: names that both have are taken, and other
    parameters begin as usual."""


class TopologySection(Section):
    """How the ranks are used; one of the numbers may be left out and follows from the world's size."""

    shards: Count | None = None
    """Ranks that store the parameters; by default 1."""
    replicas: Count | None = None
    """Instances of the model; by default as many as the ranks allow."""
    partitions: Count | None = None
    """Ranks that compute one replica together; by default 1."""
    colocate: bool = False
    """Put the shards on ranks that are also workers, instead of on ranks of their own."""
    shard_ranks: Literal["spread", "first"] = "spread"
    """``spread``: shards are on ranks at equal distances, so that each node has about as many of them; ``first``: on
    the first ranks, e.g. those of the first component of a heterogeneous job, on nodes with much memory."""
    spares: CountOrNone = 0
    """Further replicas of Downpour that learn nothing until another one dies, and then go on in its place."""
    evaluators: CountOrNone = 0
    """Further instances of the model that evaluate the test data while the replicas of Downpour learn."""
    replacements: CountOrNone = 0
    """Processes that may be started in the places of ranks that have died, where the MPI can (Open MPI 5 with fault
    tolerance, ``dbmpi train``); the run then goes on from its last checkpoint."""


class PlacedLayer(Section):
    """How one layer is cut."""

    boxes: tuple[str, ...] | None = None
    """For each partition the outputs that it computes, a range for each axis: ``"0:8, :, 46:91"``; ``""`` for none."""
    split: Literal["outputs", "inputs"] | None = None
    """Whether the workers divide its outputs, or its inputs and add up; by default whichever moves fewer bytes."""


class PlacementSection(Section):
    """How a replica is cut over its partitions; by default so that little has to be exchanged."""

    weights: tuple[Positive, ...] | None = None
    """Relative speed of the machine of each partition; boxes are in proportion.  By default all are equal."""
    layers: dict[Name, PlacedLayer] = {}  # noqa: RUF012 - copied for each section
    """A ``[placement.layers.NAME]`` table for each layer that is not to be cut automatically."""


ALGORITHMS = ("lbfgs", "conjugate_gradients", "gradient_descent")
"""Batch methods that Sandblaster has."""


class SandblasterSection(Section):
    """How ``optimizer.method = "sandblaster"`` works; the batch is cut into portions of ``optimizer.batch_size``."""

    algorithm: Annotated[str, Field(max_length=200)] = "lbfgs"
    """``lbfgs``, ``conjugate_gradients``, ``gradient_descent``, or ``module:function``: one of your own."""
    memory: Annotated[int, Field(ge=0, le=1000, strict=True)] = 10
    """L-BFGS: pairs of steps and gradient differences that are kept on the shards."""
    line_search: Literal["strong_wolfe", "backtracking", "fixed"] = "strong_wolfe"
    """``strong_wolfe``: More and Thuente's; ``backtracking``: Armijo's condition alone; ``fixed``: `step_length`."""
    step_length: Positive = 1.0
    """With ``line_search = "fixed"``: multiple of the method's own step that is always taken."""
    l1: NotNegative = 0.0
    """Factor of the sum of magnitudes of all parameters, added to the loss (OWL-QN; L-BFGS only)."""
    l2: NotNegative = 0.0
    """Half of this times the sum of squares of all parameters is added to the loss."""
    gtol: NotNegative = 1e-5
    """Largest magnitude of the gradient at which the run ends."""
    ftol: NotNegative = 2.2e-9
    """Relative decrease of the loss in an iteration at which the run ends."""
    batch_portions: CountOrNone = 0
    """Portions of a batch; 0, or more than there are, takes all training samples."""
    batch_iterations: Count = 10
    """Iterations on the same batch, where it is not all samples; the next ones take the next samples.  With dropout
    or a transform also of a batch of all samples: iterations with the same masks, and samples transformed alike."""
    batch_growth: Annotated[float, Field(ge=1.0, allow_inf_nan=False, strict=True)] = 1.0
    """Factor by which such a batch grows when progress stalls, up to all samples; 1 for never."""
    batch_overlap: CountOrNone = 0
    """Portions that each batch shares with the next one, for multi-batch L-BFGS: another batch in every iteration."""
    portions_per_push: Count = 4
    """Portions whose gradients a replica adds up before the shards take them; at most those of the largest batch."""
    deterministic: bool = False
    """Add up portions in their order, so that the result depends neither on timing nor on the number of replicas."""

    @field_validator("algorithm")
    @classmethod
    def _algorithm_is_one(cls, name: str) -> str:
        if name not in ALGORITHMS and not re.fullmatch(OWN, name):
            known = ", ".join(ALGORITHMS)
            raise ValueError(f"{name!r} is no batch method; known are {known}, and module:function for one of your own")
        return name

    @property
    def own(self) -> bool:
        """Whether the batch method is the user's own."""
        return self.algorithm not in ALGORITHMS

    @property
    def one_function(self) -> str:
        """The setting for which losses may not be drawn at random; empty if there is none."""
        which = f"algorithm = {self.algorithm!r}" if self.own else f"l1 = {self.l1:g}"
        return f"sandblaster.{which}" if self.own or self.l1 else ""


class Run(Section):
    """The complete description of a run: immutable, and validated when it is made.

    Each argument is a section of the same name as in a TOML file, and none is required: ``dbmpi.train`` may be given
    data and an objective instead.  A mistake raises pydantic's ``ValidationError``, a ValueError.
    """

    run: RunSection = RunSection()
    """Directory of the run, and its seed."""
    data: DataSection = DataSection()
    """Files with the training and test samples."""
    network: NetworkSection = NetworkSection()
    """Layers and loss."""
    objective: ObjectiveSection | None = None
    """Function of your own that is learned instead of a network."""
    topology: TopologySection = TopologySection()
    """How many ranks are shards, replicas, and partitions of a replica."""
    placement: PlacementSection = PlacementSection()
    """How layers are cut over the partitions."""
    optimizer: OptimizerSection = OptimizerSection()
    """Downpour or Sandblaster, and settings of both."""
    local: LocalSection = LocalSection()
    """Steps that replicas take by themselves."""
    sandblaster: SandblasterSection = SandblasterSection()
    """Settings of the batch methods."""
    server: ServerSection = ServerSection()
    """How gradients and parameters travel between workers and shards."""
    checkpoint: CheckpointSection = CheckpointSection()
    """When checkpoints are written, and whether the run resumes from one."""
    monitor: MonitorSection = MonitorSection()
    """What is reported during the run."""
    simulation: SimulationSection = SimulationSection()
    """How long everything takes where the run is simulated in virtual time."""

    @model_validator(mode="after")
    def _objective_is_alone(self) -> Run:
        if self.objective is not None and self.network.layers:
            raise ValueError("an [objective] takes the place of [[network.layers]]: leave one of the two out")
        if self.objective is not None and self.network.precision != "float32":
            raise ValueError(
                f"network.precision = {self.network.precision!r}: an objective of your own has its own arithmetic, and "
                "only layers can be told how to multiply: leave it out"
            )
        if self.objective is not None and (self.topology.partitions or 1) > 1:
            raise ValueError(
                f"topology.partitions = {self.topology.partitions}: an objective of your own is computed by one rank, "
                "as only layers say how they can be cut: leave it out, and use more replicas"
            )
        return self

    @model_validator(mode="after")
    def _inputs_fit(self) -> Run:
        if self.network.layers and not isinstance(self.data.inputs, str):
            raise ValueError(
                f"data.inputs = {list(self.data.inputs)}: a network takes one dataset; join them in the file, or train "
                "an objective of your own"
            )
        return self

    @model_validator(mode="after")
    def _steps_fit_the_server(self) -> Run:
        if self.server.fetch == "shared" and self.server.consistent:
            raise ValueError(
                "server.consistent = true needs copies of the parameters, for the shards' own memory changes while a "
                'gradient is computed: set server.fetch = "copied", or server.consistent = false'
            )
        if self.server.wire == "bfloat16" and self.optimizer.method != "downpour":
            raise ValueError(
                'server.wire = "bfloat16" is for Downpour: a batch method needs its gradients and parameters as they '
                'are; set server.wire = "float32"'
            )
        if self.server.gradients == "layers" and (self.optimizer.n_push > 1 or self.optimizer.local_rate):
            raise ValueError(
                'server.gradients = "layers" keeps no gradient to add up or to walk by: set optimizer.n_push = 1 and '
                'optimizer.local_rate = 0, or server.gradients = "whole"'
            )
        if self.server.gradients == "layers" and self.server.consistent:
            raise ValueError(
                "server.consistent = true applies a push at one go, for which all of it must be there: set "
                'server.gradients = "whole", or server.consistent = false'
            )
        if self.server.gradients == "layers" and self.optimizer.clip_norm:
            raise ValueError(
                "optimizer.clip_norm needs the norm of the whole gradient before any of it is pushed: set "
                'server.gradients = "whole", or optimizer.clip_norm = 0'
            )
        if self.server.fetch == "shared" and (self.optimizer.n_fetch > 1 or self.optimizer.local_rate):
            raise ValueError(
                'server.fetch = "shared" computes on the shards\' own memory, which is never of an earlier fetch and '
                "not the replica's to change: set optimizer.n_fetch = 1 and optimizer.local_rate = 0, or server.fetch "
                '= "copied"'
            )
        return self

    @model_validator(mode="after")
    def _staleness_fits(self) -> Run:
        for mistake in staleness.mistakes(self.server, self.optimizer):
            raise ValueError(mistake)
        for mistake in exchange.mistakes(self.server, self.optimizer, self.local, self.topology):
            raise ValueError(mistake)
        return self

    @model_validator(mode="after")
    def _mirror_fits(self) -> Run:
        if not self.server.mirror:
            return self
        given = f"server.mirror = {self.server.mirror}"
        if self.optimizer.method == "sandblaster":
            raise ValueError(f"{given} is for Downpour: leave it out, as Sandblaster loses an iteration at most")
        if self.topology.shards in (None, 1):
            raise ValueError(
                f"{given} needs another shard to hold each one's mirror: set topology.shards to 2 or more, or "
                "server.mirror = 0"
            )
        return self

    @model_validator(mode="after")
    def _metric_fits(self) -> Run:
        if self.network.layers and (mistake := mistake_in_metric(self.monitor, self.network.loss)):
            raise ValueError(mistake)
        return self

    @model_validator(mode="after")
    def _weights_fit(self) -> Run:
        weights = "data.weights" if self.data.weights else "network.class_weights" if self.network.class_weights else ""
        if weights and self.network.loss == "reconstruction":
            raise ValueError(f"{weights} goes with losses that have targets, not with 'reconstruction': leave it out")
        return self

    @model_validator(mode="after")
    def _method_fits(self) -> Run:
        sandblaster = self.sandblaster
        if sandblaster.l1 and sandblaster.algorithm != "lbfgs":
            raise ValueError(
                f"sandblaster.l1 = {sandblaster.l1:g} needs sandblaster.algorithm = 'lbfgs', not "
                f"{sandblaster.algorithm!r}"
            )
        if sandblaster.own and sandblaster.batch_portions:
            raise ValueError(
                f"sandblaster.algorithm = {sandblaster.algorithm!r} goes with batches of all samples only: set "
                "sandblaster.batch_portions = 0"
            )
        if self.optimizer.method == "sandblaster" and self.draws and sandblaster.one_function:
            drawn = "dropout makes another one with each mask: leave the dropout layers away"
            if self.data.transform is not None:
                drawn = "data.transform makes another one in each epoch: leave it out"
            raise ValueError(f"{sandblaster.one_function} minimises one function, and {drawn}, or take another method")
        if self.optimizer.method == "sandblaster" and self.optimizer.warms:
            raise ValueError(
                "optimizer.warmstart is for the method 'downpour'; to begin Sandblaster from parameters that Downpour "
                "has learned, resume from its checkpoint with checkpoint.resume = 'auto'"
            )
        if sandblaster.batch_overlap:
            least = 2 * sandblaster.batch_overlap
            needs = {
                f"sandblaster.batch_portions of at least {least}, not {sandblaster.batch_portions}": (
                    sandblaster.batch_portions >= least
                ),
                f"sandblaster.batch_iterations = 1, not {sandblaster.batch_iterations}": (
                    sandblaster.batch_iterations == 1
                ),
                f"sandblaster.line_search = 'fixed', not {sandblaster.line_search!r}": (
                    sandblaster.line_search == "fixed"
                ),
                f"sandblaster.algorithm = 'lbfgs', not {sandblaster.algorithm!r}": sandblaster.algorithm == "lbfgs",
                f"sandblaster.batch_growth = 1, not {sandblaster.batch_growth:g}": sandblaster.batch_growth == 1,
            }
            wrong = [need for need, met in needs.items() if not met]
            if wrong:
                raise ValueError(
                    f"sandblaster.batch_overlap = {sandblaster.batch_overlap}: batches that share portions need "
                    + " and ".join(wrong)
                )
        if self.optimizer.method == "sandblaster" and sandblaster.l1 and sandblaster.batch_portions:
            raise ValueError("sandblaster.l1 goes with batches of all samples only: set sandblaster.batch_portions = 0")
        return self

    @property
    def in_rounds(self) -> bool:
        """Whether shards apply the mean of several pushes, for which replicas wait."""
        return exchange.in_rounds(self.optimizer, self.local)

    @property
    def draws(self) -> bool:
        """Whether a loss depends on what is drawn at random for each batch, by dropout or by a user's transform."""
        return self.network.drops or self.data.transform is not None

    def to_json(self) -> str:
        """Return the effective description, defaults included, as JSON text."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str) -> Run:
        """Read a description that `to_json` wrote; raises UserError if it does not describe a run.

        Parameters
        ----------
        text
            The description, as JSON.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise UserError(explain(error, cls, "the stored description")) from None
