"""What `convergence.py` compares: the methods, each with the setting whose rate is searched for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
"""Of the search."""
WARM_STEPS, OWN_STEPS, BACKUPS = 800, 10, 1
"""Of one replica before the others; of a replica from push to push; replicas that a round need not wait for."""
RATE, LOCAL_RATE = "optimizer.learning_rate", "local.learning_rate"


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    replicas: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    middle: float = 0.0
    """Of the three rates that are tried first."""
    rate: str = RATE
    """The setting that is searched for."""
    like: str = ""
    """The method whose rate it takes instead."""
    line: tuple[str, str] | None = None
    """Color and style of its curve; most have none."""
    checked: bool = False
    """Whether it is also run on real ranks where it can be simulated."""

    @property
    def exchange(self) -> str:
        """How replicas come together: ``asynchronous``, or one of the others."""
        return str(self.settings.get("optimizer.exchange", self.settings.get("optimizer.method", "asynchronous")))

    @property
    def slug(self) -> str:
        """The name as one word."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.name).strip("-")


_SGD = {"optimizer.rule": "sgd"}
_ADAGRAD = {"optimizer.rule": "adagrad"}
_WARM = {"optimizer.warmstart": WARM_STEPS}
_SELDOM = {"optimizer.n_push": 5, "optimizer.n_fetch": 5}
_STEPS = {"local.steps": OWN_STEPS}
_MOST = 8
"""Replicas."""

ONE, ONE_ADAGRAD = "SGD [1]", "Adagrad [1]"
RECOMMENDED = f"Downpour, Adagrad, warmstart [{_MOST}]"
COLLAPSED = f"Downpour, the rate of {ONE} [{_MOST}]"
METHODS = (
    Method(ONE, 1, _SGD, 0.1, line=("black", "-")),
    *(Method(f"Downpour [{number}]", number, _SGD, 0.1) for number in (2, 4)),
    Method(f"Downpour [{_MOST}]", _MOST, _SGD, 0.03, line=("tab:blue", "-")),
    Method(COLLAPSED, _MOST, _SGD, like=ONE, line=("tab:blue", ":"), checked=True),
    Method(f"Downpour, warmstart [{_MOST}]", _MOST, {**_SGD, **_WARM}, 0.03),
    Method(f"Downpour, n_push = n_fetch = 5 [{_MOST}]", _MOST, {**_SGD, **_SELDOM}, 0.01),
    Method(f"Downpour, staleness <= 4 [{_MOST}]", _MOST, {**_SGD, "server.max_staleness": 4}, 0.03),
    Method(f"Downpour, rate / staleness [{_MOST}]", _MOST, {**_SGD, "optimizer.staleness_rate": "inverse"}, 0.1),
    Method(
        f"Downpour, delay compensation [{_MOST}]", _MOST, {**_SGD, "optimizer.delay_compensation": "adaptive"}, 0.03
    ),
    Method(ONE_ADAGRAD, 1, _ADAGRAD, 0.01, line=("grey", "-")),
    *(Method(f"Downpour, Adagrad [{number}]", number, _ADAGRAD, 0.01) for number in (2, 4)),
    Method(f"Downpour, Adagrad [{_MOST}]", _MOST, _ADAGRAD, 0.01),
    *(
        Method(
            f"Downpour, Adagrad, warmstart [{number}]",
            number,
            {**_ADAGRAD, **_WARM},
            like=f"Downpour, Adagrad [{number}]",
        )
        for number in (2, 4)
    ),
    Method(RECOMMENDED, _MOST, {**_ADAGRAD, **_WARM}, 0.01, line=("tab:green", "-"), checked=True),
    Method(
        f"Downpour, Adagrad, warmstart, n_push = n_fetch = 5 [{_MOST}]", _MOST, {**_ADAGRAD, **_WARM, **_SELDOM}, 0.01
    ),
    Method(
        f"EASGD, momentum, {OWN_STEPS} steps [{_MOST}]",
        _MOST,
        {"optimizer.exchange": "easgd", "local.rule": "momentum", **_STEPS},
        0.01,
        LOCAL_RATE,
        line=("tab:orange", "-"),
    ),
    Method(
        f"local, AdamW, {OWN_STEPS} steps [{_MOST}]",
        _MOST,
        {"optimizer.exchange": "local", **_STEPS},
        0.001,
        LOCAL_RATE,
        line=("tab:purple", "-"),
    ),
    Method(
        f"synchronous, Adagrad [{_MOST}]",
        _MOST,
        {"optimizer.exchange": "synchronous", **_ADAGRAD},
        0.01,
        line=("tab:brown", "-"),
    ),
    Method(
        f"backup, Adagrad [{_MOST}, {BACKUPS} of them]",
        _MOST,
        {"optimizer.exchange": "backup", "optimizer.backups": BACKUPS, **_ADAGRAD},
        like=f"synchronous, Adagrad [{_MOST}]",
    ),
    Method(
        f"Sandblaster L-BFGS [{_MOST}]",
        _MOST,
        {"optimizer.method": "sandblaster", "optimizer.batch_size": 200, "sandblaster.portions_per_push": 16},
        line=("tab:red", "-"),
    ),
)


def next_rates(tried: Mapping[float, float], middle: float) -> list[float]:
    """Return the rates to try next; none where the best one has been tried with both of its neighbours.

    Parameters
    ----------
    tried
        Accuracy for each rate that has been tried.
    middle
        Of the first three.
    """
    best = max(tried, key=lambda rate: tried[rate]) if tried else middle
    number = RATES.index(best)
    around = RATES[max(0, number - 1) : number + 2]
    return [rate for rate in around if rate not in tried]
