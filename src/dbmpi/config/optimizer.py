"""The section ``[optimizer]``: methods, rules, schedules, and steps."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from dbmpi.config.layers import OWN
from dbmpi.config.values import Count, CountOrNone, NotNegative, Positive, Section

RULES = ("sgd", "momentum", "adagrad", "rmsprop", "adam", "adamw")
"""Update rules that dbmpi brings along."""

Fraction = Annotated[float, Field(ge=0, lt=1, strict=True)]


def _rule(given: dict[str, Any]) -> str:
    return {"local": "momentum", "easgd": "sgd"}.get(given.get("exchange", ""), "adagrad")


def _learning_rate(given: dict[str, Any]) -> float:
    return {"local": 0.7, "easgd": 1.0}.get(given.get("exchange", ""), 0.01)


def _nesterov(given: dict[str, Any]) -> bool:
    return given.get("exchange") == "local" and given.get("rule") == "momentum"


def _beta2(given: dict[str, Any]) -> float:
    return 0.99 if given.get("rule") == "rmsprop" else 0.999


def _compensation(given: dict[str, Any]) -> float:
    return 2.0 if given.get("delay_compensation") == "adaptive" else 0.04


def _epsilon(given: dict[str, Any]) -> float:
    return 1e-10 if given.get("rule") == "adagrad" else 1e-8


class OptimizerSection(Section):
    """How the parameters are learned."""

    method: Literal["downpour", "sandblaster"] = "downpour"
    """``downpour``: asynchronous SGD over the parameter server (paper, section 4.1); ``sandblaster``: distributed batch
    optimisation (section 4.2), see ``[sandblaster]``."""
    exchange: Literal["asynchronous", "synchronous", "backup", "local", "easgd"] = "asynchronous"
    """Downpour, see relatives.md: ``asynchronous``: shards apply each push at once; ``synchronous``: they apply the
    mean of the gradients of all replicas, which wait for it; ``backup``: the same without the last `backups` of them;
    ``local``: replicas take steps of their own and push how far they have come, see ``[local]``; ``easgd``: they keep
    their own parameters, and are drawn towards those of the shards."""
    backups: Count = 1
    """``backup``: replicas beyond those whose gradients the shards wait for."""
    rule: Annotated[str, Field(max_length=200)] = Field(default_factory=_rule)
    """The update that the shards apply, see rules.md: ``sgd``, ``momentum``, ``adagrad``, ``rmsprop``,
    ``adam``, ``adamw``, or ``module:function``: one of your own.  By default ``adagrad``, with ``exchange = "local"``
    ``momentum``, with ``"easgd"`` ``sgd``."""
    learning_rate: Positive = Field(default_factory=_learning_rate)
    """Rate of the rule; for ``adagrad`` the paper's gamma, about ten times the best fixed rate.  By default 0.01, with
    ``exchange = "local"`` 0.7, with ``"easgd"`` 1."""
    momentum: Fraction = 0.9
    """Momentum: fraction of the velocity that stays in each update."""
    nesterov: bool = Field(default_factory=_nesterov, strict=True)
    """Momentum: step by Nesterov's; by default ``false``, with ``exchange = "local"`` ``true``."""
    momentum_every: Count = 1
    """Nesterov's momentum: pushes of which the mean enters the velocity together, while each moves the parameters by
    its own part: as many as there are replicas, where these push differences asynchronously (delayed Nesterov)."""
    beta1: Fraction = 0.9
    """Adam and AdamW: fraction of the mean gradient that stays in each update."""
    beta2: Fraction = Field(default_factory=_beta2)
    """RMSProp, Adam and AdamW: the same for the mean square; by default 0.99 for ``rmsprop``, 0.999 otherwise."""
    initial_accumulator: NotNegative = 0.0
    """Adagrad: what the sum of squared gradients starts from."""
    epsilon: NotNegative = Field(default_factory=_epsilon)
    """All rules that divide by a root: added to it, so that gradients much smaller than this give smaller steps; by
    default 1e-10 for ``adagrad``, 1e-8 otherwise."""
    weight_decay: NotNegative = 0.0
    """This times the parameters is added to the gradient (coupled); with ``adamw``, this times the learning rate is the
    fraction by which each update shrinks the parameters (decoupled)."""
    schedule: Literal["constant", "step", "cosine", "inverse_root"] = "constant"
    """How the learning rate decays with the samples learned from, after the warm-up."""
    warmup_epochs: NotNegative = 0.0
    """Epochs in which the learning rate grows to its full value, in proportion to the samples."""
    decay_epochs: Positive | None = None
    """``step``: epochs from one step to the next; ``cosine``: epochs of the decay, by default all after the warm-up;
    ``inverse_root``: epochs after which the rate has fallen to sqrt(1/2), by default those of the warm-up."""
    decay_factor: Annotated[float, Field(ge=0, le=1, strict=True)] = 0.1
    """``step``: what each step multiplies the rate by; ``cosine``: the fraction of the rate that is left at its end."""
    staleness_rate: Literal["constant", "inverse"] = "constant"
    """Downpour: ``inverse`` divides the learning rate of each push by its staleness, where that is above 1."""
    delay_compensation: Literal["none", "constant", "adaptive"] = "none"
    """Downpour: move stale gradients towards what they would be at the present parameters, with a ``constant`` factor,
    or one that adapts to the size of the gradients."""
    compensation_factor: NotNegative = Field(default_factory=_compensation)
    """Factor of the compensation, Zheng et al.'s lambda; by default 2 if it is ``adaptive``, 0.04 otherwise."""
    compensation_beta: Fraction = 0.95
    """``adaptive``: fraction of the mean square that stays in each update."""
    clip_norm: NotNegative = 0.0
    """A replica's gradient whose norm is larger is scaled down to it before it is pushed; 0 never does that.  All of
    a gradient is then pushed at once, also with overlap."""
    settings: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(default_factory=dict)
    """With a rule of your own: numbers for it, instead of the defaults of its arguments."""
    batch_size: Count = 128
    """Samples of one step of one replica; at most all training samples."""
    epochs: Positive = 10.0
    """Passes through the training samples, all replicas together."""
    n_push: Count = 1
    """Push the accrued gradient every this many steps."""
    accumulate: Literal["sum", "mean"] = "sum"
    """What is pushed of ``n_push`` gradients: their ``sum``, as in the paper, or their ``mean``."""
    n_fetch: Count = 1
    """Fetch the parameters every this many steps."""
    local_rate: NotNegative = 0.0
    """Rate alpha of the replica's own steps between two fetches (algorithm 1.1); 0 takes none.  It follows the same
    schedule."""
    most_withheld: CountOrNone = 3
    """Downpour: pushes in a row that a replica may withhold because their gradient is not finite; one more ends the
    run, and with 0 the first one does.  Otherwise all of a gradient is then pushed at once, also with overlap.  With
    ``server.gradients = "layers"``, where some of it has left when the rest is computed, it counts as 0."""
    roll_back: Annotated[float, Field(ge=0, lt=1, strict=True)] = 0.0
    """Instead of ending there, the run goes back to its last checkpoint, and on with its rates times this factor;
    0 never does that."""
    warmstart: CountOrNone = 0
    """One replica takes this many steps alone before the others are released."""
    warmstart_samples: CountOrNone = 0
    """The same in samples, instead of steps."""
    warmstart_loss: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """The same until the mean loss of its last 100 pushes is as low as this, instead of a number of steps."""
    release_samples: CountOrNone = 0
    """After the warmstart, the others are released one after the other, each after so many further samples; 0: all at
    once."""

    @property
    def warms(self) -> bool:
        """Whether there is a warmstart."""
        return bool(self.warmstart or self.warmstart_samples) or self.warmstart_loss is not None

    @property
    def walks(self) -> bool:
        """Whether replicas take steps by a rule of their own."""
        return self.exchange in ("local", "easgd")

    @property
    def spared(self) -> int:
        """Pushes of a round that the shards do not wait for."""
        return self.backups if self.exchange == "backup" else 0

    @property
    def own(self) -> bool:
        """Whether the update rule is the user's own."""
        return self.rule not in RULES

    @property
    def period(self) -> float:
        """Epochs by which the decay of the learning rate is counted, given or by default."""
        if self.decay_epochs is not None:
            return self.decay_epochs
        return {"cosine": self.epochs - self.warmup_epochs, "inverse_root": self.warmup_epochs}.get(self.schedule, 1.0)

    @field_validator("rule")
    @classmethod
    def _rule_is_one(cls, name: str) -> str:
        if name not in RULES and not re.fullmatch(OWN, name):
            known = ", ".join(RULES)
            raise ValueError(f"{name!r} is no update rule; known are {known}, and module:function for one of your own")
        return name

    @model_validator(mode="after")
    def _settings_fit_the_rule(self) -> OptimizerSection:
        if self.nesterov and self.rule != "momentum":
            raise ValueError(f"optimizer.nesterov = true needs optimizer.rule = 'momentum', not {self.rule!r}")
        if self.momentum_every > 1 and not self.nesterov:
            raise ValueError(
                f"optimizer.momentum_every = {self.momentum_every} needs optimizer.nesterov = true: set that, or leave "
                "it out"
            )
        if self.momentum_every > 1 and self.weight_decay:
            raise ValueError(
                f"optimizer.momentum_every = {self.momentum_every} goes without weight decay: set "
                f"optimizer.weight_decay = 0, not {self.weight_decay:g}"
            )
        if self.weight_decay and self.own:
            raise ValueError(
                f"optimizer.weight_decay goes with the rules of dbmpi, not with {self.rule!r}: add it to that function"
            )
        if self.settings and not self.own:
            raise ValueError(f"optimizer.settings goes with a rule of your own, module:function, not {self.rule!r}")
        return self

    @model_validator(mode="after")
    def _warmstart_is_one(self) -> OptimizerSection:
        ends = {
            f"warmstart = {self.warmstart}": self.warmstart > 0,
            f"warmstart_samples = {self.warmstart_samples}": self.warmstart_samples > 0,
            f"warmstart_loss = {self.warmstart_loss}": self.warmstart_loss is not None,
        }
        given = [f"optimizer.{setting}" for setting, is_given in ends.items() if is_given]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are two ends of one warmstart: leave all but one out")
        if self.release_samples and not given:
            raise ValueError(
                f"optimizer.release_samples = {self.release_samples} is about what follows a warmstart: set "
                "optimizer.warmstart, warmstart_samples or warmstart_loss, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _schedule_is_whole(self) -> OptimizerSection:
        if self.schedule == "constant" and self.decay_epochs is not None:
            raise ValueError(
                f"optimizer.decay_epochs = {self.decay_epochs:g} needs a schedule that decays: set optimizer.schedule "
                "to 'step', 'cosine' or 'inverse_root', or leave it out"
            )
        if self.period <= 0 and self.schedule == "cosine":
            raise ValueError(
                f"optimizer.warmup_epochs = {self.warmup_epochs:g} leaves nothing of optimizer.epochs = "
                f"{self.epochs:g} for the cosine: make it shorter, or set optimizer.decay_epochs"
            )
        if (self.schedule == "step" and self.decay_epochs is None) or self.period <= 0:
            raise ValueError(
                f"optimizer.schedule = {self.schedule!r} needs optimizer.decay_epochs, the epochs "
                + ("from one step to the next" if self.schedule == "step" else "to sqrt(1/2), or a warm-up")
            )
        return self
