"""The model that a run learns: a network, or an objective of the user's own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dbmpi.config.layers import OWN, AnyLayer, Dense, Dropout, OwnCode, OwnLayer
from dbmpi.config.values import NotNegative, PossiblePath, Section


class NetworkSection(Section):
    """The model: layers from the input upwards, and the loss on top of the last one."""

    loss: Literal["softmax", "logistic", "squared", "reconstruction"] = "softmax"
    """``softmax``: cross-entropy over classes; ``logistic``: one-vs-all, or several labels of 0 and 1 a sample;
    ``squared``: half the squared distance;
    ``reconstruction``: no targets, but the layers' own objectives: their `reconstruction` and `penalty`."""
    class_weights: Literal["balanced"] | Annotated[tuple[NotNegative, ...], Field(min_length=1)] | None = None
    """Weight of each class in the loss that is learned, in the order of the classes; ``balanced``: in inverse
    proportion to the number of its samples."""
    layers: tuple[AnyLayer, ...] = ()
    """The layers, each a ``[[network.layers]]`` table; required, unless there is an ``[objective]``."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Numbers that dense layers, local layers and convolutions multiply: ``bfloat16`` rounds weights, inputs and
    gradients to it just for their products, which are added up in float32.  Faster on processors with AMX or
    AVX512-BF16, as ``dbmpi doctor`` tells."""
    code: PossiblePath | None = None
    """Directory in which modules of your own layers, methods and objectives are looked for first; by default that of
    the configuration."""

    @property
    def drops(self) -> bool:
        """Whether a layer drops values at random."""
        return any(isinstance(layer, Dropout) and layer.rate > 0 for layer in self.layers)

    @model_validator(mode="after")
    def _layers_fit(self) -> NetworkSection:
        if not self.layers:
            return self
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
        if not isinstance(last, Dense | OwnLayer):
            raise ValueError(
                f"the last layer must be of type 'dense' or your own, for its units are the outputs, not {last.type!r}"
            )
        if isinstance(last, Dense) and self.loss != "squared" and last.activation != "linear":
            raise ValueError(
                f"the loss {self.loss!r} contains the last activation: the last layer must be 'linear', "
                f"not {last.activation!r}"
            )
        return self

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The layers' names, given or by default."""
        return tuple(
            layer.name or f"{layer.type.rpartition(':')[2].lower()}{number}"
            for number, layer in enumerate(self.layers, 1)
        )


class ObjectiveSection(OwnCode):
    """An objective of your own instead of a network (see own-objectives.md), with settings of its own.

    All keys but `use` go to the class.
    """

    use: Annotated[str, Field(pattern=f"^{OWN}$", max_length=200)]
    """``module:Class`` of the objective; the module is looked for in `network.code` first, then where Python finds
    modules."""
