"""A trained network from its checkpoint, to evaluate it and to predict with it; parameters are read when asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ValidationError

from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.checkpoint.schema import PARAMETERS, CheckpointInfo
from dbmpi.config import NetworkSection, ObjectiveSection, PlacementSection, Section, explain
from dbmpi.data.source import Source
from dbmpi.errors import Damaged, UserError
from dbmpi.index.layout import Stretch
from dbmpi.kernels.memory import aligned_empty
from dbmpi.network.description import Network
from dbmpi.network.losses import Targets
from dbmpi.network.own import from_files, make_objective
from dbmpi.objective import OwnObjective
from dbmpi.replica.own_objective import OwnModel
from dbmpi.replica.own_state import OwnState


@dataclass(frozen=True)
class TrainedNetwork:
    """A network as a checkpoint describes it, and the open checkpoint."""

    checkpoint: Checkpoint
    notice: str
    """Empty, or why this checkpoint was taken instead of the latest one, and what it lacks."""
    info: CheckpointInfo
    section: NetworkSection
    placement: PlacementSection
    """How it was to be cut over the partitions of the training."""
    network: Network | OwnModel

    @property
    def path(self) -> Path:
        """The file."""
        return self.checkpoint.path

    def parameters(self, runs: Sequence[Stretch]) -> np.ndarray:
        """Return the vector, float32, that is made of runs of the whole parameters; only they are read."""
        out = aligned_empty(sum(run.length for run in runs))
        for run in runs:
            self.checkpoint.read(PARAMETERS, run.start, out[run.local : run.local + run.length])
        return out

    def close(self) -> None:
        """Close the checkpoint; without effect the second time."""
        self.checkpoint.close()

    @property
    def units(self) -> int:
        """Number of outputs."""
        return self.network.outputs

    @property
    def called(self) -> str:
        """What it is called in messages."""
        learned = self.network.called if isinstance(self.network, OwnModel) else "the network"
        return f"{learned} in {self.path}"

    @property
    def targets(self) -> Literal["required", "optional"]:
        """Whether an evaluation needs targets: not where layers have objectives of their own."""
        return "optional" if self.network.loss is None else "required"

    def expect(self, source: Source, *, targets: bool) -> tuple[str, ...]:
        """Raise UserError unless samples of a data file, and where asked their targets, suit the network.

        Parameters
        ----------
        source
            The data file.
        targets
            Whether its targets will be compared with the outputs.

        Returns
        -------
        tuple of str
            What the user should know.  The file's classes are from then on those of the training with the same labels.
        """
        info = self.info
        if source.input_shape != info.input_shape:
            raise UserError(
                f"{source.path}: samples have shape {source.input_shape}, but {self.called} was trained on "
                f"{info.input_shape}; expected the same"
            )
        own = isinstance(self.network, OwnModel)
        needed = self.info.classes > 0 or source.has_targets if own else self.network.loss is not None
        targets = targets and needed
        if targets and not source.has_targets:
            raise UserError(f"{source.path}: has no dataset {source.names['targets']!r} to compare the outputs with")
        notices = source.mean_the_same(info.meaning, info.classes, learner=self.called, targets=targets)
        if not targets:
            return notices
        if info.classes == 0:
            if not own:
                source.expect(self.units, self.section.loss)
        elif source.classes is None:
            raise UserError(
                f"{source.path}: the targets are {source.target_size} values a sample, but {self.called} "
                f"was trained on {info.classes} classes; expected integers from 0 to {info.classes - 1}"
            )
        elif source.classes > info.classes:
            raise UserError(
                f"{source.path}: has {source.classes} classes, but {self.called} was trained on "
                f"{info.classes}; expected no class that is not trained"
            )
        return notices


def load(path: Path, code: Sequence[Path] = (), objective: OwnObjective | None = None) -> TrainedNetwork:
    """Read the network of a checkpoint, or of the latest checkpoint of a run directory.

    Parameters
    ----------
    path
        The checkpoint, or the directory.
    code
        Files from which classes of a user's own layers may be loaded; a checkpoint that needs others is refused.
    objective
        A user's own, whose parameters the checkpoint is expected to hold; None: made from the class that it names.

    Raises
    ------
    UserError
        If there is no whole checkpoint, or it does not describe a network that its arrays fit.
    """
    checkpoint = Checkpoint.open(path)
    try:
        info, notice = checkpoint.info, checkpoint.notice
        section, placement, described = _sections(checkpoint.path, info.configuration)
        # The seed is only for initial weights.
        targets: Targets = "classes" if info.classes else "values"
        if described is not None:
            if objective is None:
                objective = make_objective(described, from_files(code))
            network: Network | OwnModel = OwnModel(objective, 0, f"the objective {described.use!r}")
        elif objective is not None:
            raise UserError(
                f"{checkpoint.path}: holds a network, and objective={objective!r:.60} was given; leave that out"
            )
        else:
            network = Network(section, info.input_shape, 0, targets=targets, load=from_files(code))
        checkpoint.expect(network.layout, what="network" if described is None else "objective")
        if isinstance(network, OwnModel) and (lacking := load_state(network.state, checkpoint)):
            notice = f"{notice}; {lacking}" if notice else lacking
        if isinstance(network, Network) and info.classes > network.outputs:
            raise Damaged(
                f"{checkpoint.path}: /run/classes is {info.classes}, expected at most the {network.outputs} outputs of "
                "its network"
            )
    except BaseException:
        checkpoint.close()
        raise
    return TrainedNetwork(checkpoint, notice, info, section, placement, network)


def load_state(state: OwnState, checkpoint: Checkpoint) -> str:
    """Let the `state` of an objective be that of its `checkpoint`; return a line for the user where that has none.

    Raises
    ------
    UserError
        If the arrays in the file are not those of the objective; they are not read then.
    """
    if state.nbytes and not checkpoint.state_arrays:
        return f"{checkpoint.path}: has no state of the objective, which begins with its first values"
    state.expect(checkpoint.state_arrays, str(checkpoint.path))
    state.restore(checkpoint.objective_state())
    return ""


def _sections(path: Path, configuration: str) -> tuple[NetworkSection, PlacementSection, ObjectiveSection | None]:
    """Return the description of what was learned, and how it was cut: the rest may be of another version of dbmpi."""
    try:
        described = json.loads(configuration)
        network, placement = described["network"], described.get("placement", {})
        objective = described.get("objective")
        if objective is None and not network["layers"]:
            raise KeyError("layers")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"{path}: the run was not described with a [network] or an [objective]; evaluate it with the program that "
            "trained it"
        ) from None
    section: type[Section] = NetworkSection
    try:
        found = NetworkSection.model_validate(network)
        section = PlacementSection
        placed = PlacementSection.model_validate(placement)
        section = ObjectiveSection
        return found, placed, None if objective is None else ObjectiveSection.model_validate(objective)
    except ValidationError as error:
        raise UserError(explain(error, section, str(path))) from None
