"""Objectives in NumPy, as users write them, for tests of runs; good ones, and some that are wrong."""

from __future__ import annotations

import numpy as np


class Plane:
    """Least squares: ``w x + b`` for targets of one value; all in float64, as NumPy computes."""

    def __init__(self, features: int = 6, scale: float = 0.1) -> None:
        self._features, self._scale = features, scale

    def initial(self, seed):
        weights = np.random.default_rng(seed).normal(0, self._scale, self._features)
        return {"slope": {"weights": weights}, "bias": np.zeros(())}

    def loss_and_gradient(self, parameters, batch):
        weights, bias = parameters["slope"]["weights"].astype(float), parameters["bias"]
        errors = batch.inputs @ weights + bias - batch.targets[:, 0]
        gradient = {"bias": errors.mean(), "slope": {"weights": errors @ batch.inputs / len(errors)}}
        return (errors**2).mean() / 2, gradient

    def predict(self, parameters, inputs):
        return inputs @ parameters["slope"]["weights"] + parameters["bias"]


class Dropping(Plane):
    """Drops inputs at random, and notes for which steps."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []

    def loss_and_gradient(self, parameters, batch):
        self.steps.append(batch.step)
        batch.inputs[...] *= np.random.default_rng(batch.step).random(batch.inputs.shape) < 0.9
        return super().loss_and_gradient(parameters, batch)

    def evaluate(self, parameters, batch):
        return super().loss_and_gradient(parameters, batch)[0]


class Centred(Plane):
    """Takes the mean of all inputs that it has seen from the inputs; `moving=False` leaves the mean as it is."""

    def __init__(self, moving: bool = True) -> None:
        super().__init__()
        self._moving = moving
        self.state = {"seen": np.zeros((), np.int64), "of": {"inputs": np.full(6, 0.25)}}

    def loss_and_gradient(self, parameters, batch):
        mean, seen = self.state["of"]["inputs"], self.state["seen"]
        if self._moving:
            seen += batch.samples
            mean += (batch.inputs.mean(axis=0) - mean) * batch.samples / seen
        return super().loss_and_gradient(parameters, batch._replace(inputs=batch.inputs - mean))


class Softmax:
    """Classes; counts those that are right."""

    parameters = {"weights": np.zeros((6, 3), np.float32)}  # noqa: RUF012

    def _probabilities(self, parameters, batch):
        values = batch.inputs @ parameters["weights"]
        values = np.exp(values - values.max(axis=1, keepdims=True))
        return values / values.sum(axis=1, keepdims=True)

    def loss_and_gradient(self, parameters, batch):
        found = self._probabilities(parameters, batch)
        of_class = found[np.arange(len(found)), batch.targets]
        right = int((found.argmax(axis=1) == batch.targets).sum())
        found[np.arange(len(found)), batch.targets] -= 1
        return (-np.log(of_class).mean(), right), {"weights": batch.inputs.T @ found / len(found)}

    def evaluate(self, parameters, batch):
        found = self._probabilities(parameters, batch)
        right = int((found.argmax(axis=1) == batch.targets).sum())
        return -np.log(found[np.arange(len(found)), batch.targets]).mean(), right


class Measured(Softmax):
    """With means of its own over held-out samples."""

    def metrics(self, parameters, batch):
        found = self._probabilities(parameters, batch)
        return {"surest": found.max(axis=1).mean(), "of-class-0": np.float32((batch.targets == 0).mean())}


class Wrong(Plane):
    """Wrong in the way that its setting names."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self._way, self._calls = way, 0
        if way == "metrics":
            self.metrics = lambda parameters, batch: [1.0]
        if way == "making":
            raise ValueError("nothing works today")

    def initial(self, seed):
        first = super().initial(seed)
        ways = {
            "no parameters": {},
            "no dictionary": np.zeros(3),
            "integers": {"weights": np.zeros(6, int)},
            "a name": {"a/b": np.zeros(6)},
            "nothing in it": {"weights": np.zeros(0)},
            "not finite at first": {"weights": np.full(6, np.nan)},
        }
        return ways.get(self._way, first)

    def loss_and_gradient(self, parameters, batch):
        loss, gradient = super().loss_and_gradient(parameters, batch)
        self._calls += 1
        match self._way:
            case "shape":
                gradient["slope"]["weights"] = gradient["slope"]["weights"][:, None]
            case "name":
                gradient["slope"]["weight"] = gradient["slope"].pop("weights")
            case "missing":
                del gradient["bias"]
            case "complex":
                gradient["bias"] = np.ones((), complex)
            case "loss alone":
                return loss
            case "loss of each sample":
                return np.ones(len(batch.inputs)), gradient
            case "writing":
                parameters["slope"]["weights"][0] = 1
            case "infinite far away" if 10 <= self._calls < 17:  # in the second pass of seven portions, the first try
                return np.float32(1e-9), {"bias": 1e300, "slope": {"weights": np.full(6, -np.inf)}}
            case "infinite" if self._calls > 3:
                gradient["bias"] = np.inf
            case "raising" if self._calls > 3:
                raise ZeroDivisionError("one sample too many")
        return loss, gradient

    def predict(self, parameters, inputs):
        found = super().predict(parameters, inputs)
        return np.repeat(found[:, None], 1 + len(found) % 7, 1) if self._way == "width" else found
