"""The kinds of layers, one section each."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from dbmpi.config.values import Count, Name, NotNegative, Odd, Positive, Section, shown

Activation = Literal["sigmoid", "tanh", "relu", "linear"]


class Dense(Section):
    """A fully connected layer: ``y = activation(W x + b)``."""

    type: Literal["dense"] = "dense"
    name: Name | None = None
    """Name in checkpoints; by default the type and its number, e.g. ``dense1``."""
    units: Count
    """Number of outputs."""
    activation: Activation = "linear"
    """Function applied to every output."""
    initial_scale: NotNegative = 1.0
    """Factor on the standard deviation of the initial weights."""


class _Filters(Section):
    """What layers of filters that see a field of their inputs have in common."""

    type: str
    name: Name | None = None
    """Name in checkpoints; by default the type and its number, e.g. ``local1`` or ``convolution2``."""
    maps: Count
    """Number of maps: filters at every position."""
    field: Count | tuple[Count, Count]
    """Rows and columns of the inputs that a filter sees; one number for a square."""
    stride: Count = 1
    """Rows, and columns, from one field to the next."""
    activation: Activation = "linear"
    """Function applied to every output."""
    initial_scale: NotNegative = 1.0
    """Factor on the standard deviation of the initial weights."""
    reconstruction: NotNegative = 0.0
    """With the loss ``reconstruction``: weight of ``|x' - x|^2`` for inputs x and their estimate from the outputs."""


class Local(_Filters):
    """A locally connected layer: a filter of its own at every position (not shared), valid borders."""

    type: Literal["local"] = "local"


class Convolution(_Filters):
    """A convolution: the same filters at every position, valid borders."""

    type: Literal["convolution"] = "convolution"


class Pooling(Section):
    """Pooling: sums up each window of a map, valid borders; windows overlap where the stride is less than the size."""

    type: Literal["pooling"] = "pooling"
    name: Name | None = None
    """Name in messages; by default the type and its number, e.g. ``pooling2``."""
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
    """Name in messages; by default the type and its number, e.g. ``normalisation3``."""
    window: Odd = 5
    """Rows and columns of the Gaussian window; odd."""
    floor: Positive = 0.01
    """Least local deviation to divide by."""


class Dropout(Section):
    """Dropout: while training, every value is zero with probability `rate` and otherwise scaled by 1 / (1 - rate)."""

    type: Literal["dropout"] = "dropout"
    name: Name | None = None
    """Name in messages, and a part of the masks' seed; by default the type and its number, e.g. ``dropout2``."""
    rate: Annotated[float, Field(ge=0, lt=1, strict=True)]
    """Probability that a value is dropped."""


OWN = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"
"""How code of a user's own is named: ``module:name``."""


class OwnCode(Section):
    """A table that names a class or function of your own: its other keys are settings that this is called with."""

    model_config = ConfigDict(extra="allow")

    @property
    def settings(self) -> dict[str, Any]:
        """The keys that go to the class or function."""
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _settings_can_be_stored(self) -> Self:
        for key, value in self.settings.items():
            if not key.isidentifier() or (key == "input_shape" and isinstance(self, OwnLayer)):
                raise ValueError(f"{key!r} cannot be the name of a setting; expected a word like 'units'")
            if not _is_plain(value):
                raise ValueError(
                    f"{key} = {shown(value)}: expected numbers, texts, true, false, lists or tables of them"
                )
        return self


class OwnLayer(OwnCode):
    """A layer of your own: a class that fulfils the contract of a layer (see own-layers.md), with settings of its own.

    All keys but those below go to the class, which is called with the layer's name, the shape of its inputs, and them.
    """

    type: Annotated[str, Field(pattern=f"^{OWN}$", max_length=200)]
    """``module:Class``; the module is looked for in `network.code` first, then where Python finds modules."""
    name: Name | None = None
    """Name in checkpoints; by default the class and its number, e.g. ``maxout2``."""


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
