"""The section ``[local]``: the steps that replicas take by themselves."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from dbmpi.config.optimizer import Fraction, OptimizerSection
from dbmpi.config.values import Count, NotNegative, Positive, Section


def _beta2(given: dict[str, Any]) -> float:
    return 0.99 if given.get("rule") == "rmsprop" else 0.999


def _epsilon(given: dict[str, Any]) -> float:
    return 1e-10 if given.get("rule") == "adagrad" else 1e-8


class LocalSection(Section):
    """How ``optimizer.exchange = "local"`` and ``"easgd"`` work.

    Each replica takes steps by a rule of its own, and pushes how far it has come.  To these differences the shards
    apply the rule of ``[optimizer]``, with a constant rate.
    """

    steps: Count = 50
    """Steps of a replica from push to push; H in the paper of DiLoCo, tau in that of EASGD."""
    pushes: Literal["synchronous", "asynchronous"] = "synchronous"
    """``local``: ``synchronous``: shards apply the mean of the differences of all replicas (DiLoCo); ``asynchronous``:
    each at once, best with ``optimizer.momentum_every``."""
    elasticity: Annotated[float, Field(gt=0, lt=1, strict=True)] | None = None
    """``easgd``: fraction of the difference by which a replica and the shards move towards each other at each push; by
    default 0.9 divided by the number of replicas."""
    rule: Literal["sgd", "momentum", "adagrad", "rmsprop", "adam", "adamw"] = "adamw"
    """Rule of the replicas' own steps, whose state stays on the replica."""
    learning_rate: Positive = 0.001
    """Its rate, which follows the schedule of ``[optimizer]``."""
    momentum: Fraction = 0.9
    """Momentum: fraction of the velocity that stays in each step."""
    nesterov: bool = Field(default=False, strict=True)
    """Momentum: step by Nesterov's."""
    beta1: Fraction = 0.9
    """Adam and AdamW: fraction of the mean gradient that stays in each step."""
    beta2: Annotated[float, Field(ge=0, lt=1, strict=True)] = Field(default_factory=_beta2)
    """RMSProp, Adam and AdamW: the same for the mean square; by default 0.99 for ``rmsprop``, 0.999 otherwise."""
    initial_accumulator: NotNegative = 0.0
    """Adagrad: what the sum of squared gradients starts from."""
    epsilon: NotNegative = Field(default_factory=_epsilon)
    """All rules that divide by a root: added to it; by default 1e-10 for ``adagrad``, 1e-8 otherwise."""
    weight_decay: NotNegative = 0.0
    """As in ``[optimizer]``, for the replicas' own steps."""

    def inner(self, optimizer: OptimizerSection) -> OptimizerSection:
        """Return the section that describes the replicas' own rule.

        Parameters
        ----------
        optimizer
            The section ``[optimizer]``, for its schedule.
        """
        own = self.model_dump(exclude={"steps", "pushes", "elasticity"})
        usual = {"exchange": "asynchronous", "momentum_every": 1, "staleness_rate": "constant"}
        return optimizer.model_copy(update=own | usual)
