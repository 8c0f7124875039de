"""How to read a data file: the names of its datasets, and the user's settings for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dbmpi.config import DataSection, NetworkSection
from dbmpi.data.encoding import NO_ENCODING, Encoding

_WANTED: dict[str, Literal["classes", "probabilities", "any"]] = {"softmax": "classes", "logistic": "probabilities"}
"""Of losses."""
Label = int | str
"""What a class is called in the user's own data."""


@dataclass(frozen=True)
class Reading:
    """How to read a data file; by default the format of ``docs/data-format.md``."""

    inputs: str | tuple[str, ...] = "inputs"
    """Name of the dataset, or of several: a network gets their features side by side, an objective each by its name."""
    targets: str = "targets"
    weights: str | None = None
    """Name of the dataset with a weight for each sample; None: all samples count alike."""
    channels: Literal["first", "last"] = "first"
    """Where in a sample of several axes the channels are; those that come last are moved to the front."""
    missing: float | None = None
    """Number to take where an input is missing; None: such files are refused."""
    wanted: Literal["classes", "probabilities", "any"] = "any"
    """``classes``: whole floating numbers and one-hot rows are taken for classes, too; ``probabilities``: values must
    lie between 0 and 1."""
    labels: tuple[Label, ...] | None = None
    """Label of each class, of the data that a network has learned from; None: find out."""
    class_weights: Literal["balanced"] | Sequence[float] | None = None
    """Weight of each class, or in inverse proportion to its number of samples."""
    encoding: Encoding | None = None
    """What is done to the inputs, of the data that a network has learned from; None: as the file says."""
    keep: Literal["auto", "memory", "file"] = "auto"
    """Where the samples of a file are while they are learned from."""
    own: bool = False
    """Whether an objective of the user's own takes the batches: samples first, and integers as they are."""

    @property
    def inputs_named(self) -> tuple[str, ...]:
        """Names of the datasets with inputs, in order; sorted for an objective, which takes them by name."""
        if isinstance(self.inputs, str):
            return (self.inputs,)
        return tuple(sorted(self.inputs)) if self.own else tuple(self.inputs)

    @classmethod
    def of(cls, data: DataSection, network: NetworkSection) -> Reading:
        """Return how to read the training data of a run, from its sections `data` and `network`."""
        return cls(
            inputs=data.inputs,
            targets=data.targets,
            weights=data.weights,
            channels=data.channels,
            missing=data.missing,
            wanted=_WANTED.get(network.loss, "any") if network.layers else "any",
            class_weights=network.class_weights,
            keep=data.keep,
            own=not network.layers,
        )

    def held_out(
        self, classes: int | None, labels: tuple[Label, ...] | None, encoding: Encoding = NO_ENCODING
    ) -> Reading:
        """Return how to read other data for a network.

        Labels then stand for the classes that were learned, and inputs are encoded as they were.  Weights matter to
        learning alone and are left out.

        Parameters
        ----------
        classes, labels
            That were learned.
        encoding
            What was done to the inputs.
        """
        if labels is None and classes:
            labels = tuple(range(classes))
        return replace(self, weights=None, class_weights=None, labels=labels, encoding=encoding)
