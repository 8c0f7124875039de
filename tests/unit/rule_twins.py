"""The update rules once more, in NumPy, as their formulas stand in books: one operation after the other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dbmpi.config import OptimizerSection


class RuleTwin:
    """The rule that an ``[optimizer]`` section describes, and its state; every operation is rounded to the dtype."""

    def __init__(self, section: OptimizerSection, parameters: np.ndarray) -> None:
        self.section = section
        self.kind: Any = parameters.dtype.type
        self.state: dict[str, np.ndarray] = {}
        names = {
            "sgd": (),
            "momentum": ("velocity",),
            "adagrad": ("accumulator",),
            "rmsprop": ("mean_square",),
            "adam": ("first_moment", "second_moment"),
            "adamw": ("first_moment", "second_moment"),
        }
        for name in names[section.rule]:
            self.state[name] = np.zeros_like(parameters)
        if section.rule == "adagrad":
            self.state["accumulator"] += self.kind(section.initial_accumulator)
        self.updates = 0

    def step(self, w: np.ndarray, g: np.ndarray, factor: float = 1.0) -> np.ndarray:
        """Return the parameters after an update by the gradient g, with the learning rate times a factor."""
        section, state, kind = self.section, self.state, self.kind
        self.updates += 1
        rate = section.learning_rate * factor
        if section.weight_decay and section.rule != "adamw":
            g = g + kind(section.weight_decay) * w
        epsilon = kind(section.epsilon)
        match section.rule:
            case "sgd":
                return w - kind(rate) * g
            case "momentum":
                stays = kind(section.momentum)
                state["velocity"] = stays * state["velocity"] + g
                along = g + stays * state["velocity"] if section.nesterov else state["velocity"]
                return w - kind(rate) * along
            case "adagrad":
                state["accumulator"] = state["accumulator"] + g * g
                root = np.sqrt(state["accumulator"]) + epsilon
                return w - kind(rate) * g / np.where(root == 0, kind(1), root)
            case "rmsprop":
                beta = section.beta2
                state["mean_square"] = kind(beta) * state["mean_square"] + kind(1 - beta) * (g * g)
                return w - kind(rate) * g / (np.sqrt(state["mean_square"]) + epsilon)
        first, second = section.beta1, section.beta2
        state["first_moment"] = kind(first) * state["first_moment"] + kind(1 - first) * g
        state["second_moment"] = kind(second) * state["second_moment"] + kind(1 - second) * (g * g)
        step = kind(rate * (1 / (1 - first**self.updates)))
        root = np.sqrt(state["second_moment"]) * kind(1 / math.sqrt(1 - second**self.updates))
        kept = kind(1 - rate * section.weight_decay) if section.rule == "adamw" else kind(1)
        return kept * w - step * state["first_moment"] / (root + epsilon)
