"""Heat in a rod: an inverse problem, the conductivity of its material from temperatures that were measured.

A sample is an experiment: a pulse of heat somewhere in the rod, and what sensors measure afterwards.  As a program this
writes experiments with noise into ``data``, or draws the profile of a checkpoint beside the true one.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dbmpi.objective import NamedArrays, Samples

SENSORS, TIMES, DURATION, WIDTH, NOISE = 8, 4, 0.1, 0.03, 0.02


class Rod:
    """Half the mean squared error of the temperatures that follow from a conductivity k(x), and its gradient.

    The temperature u(x, t) of a rod from x = 0 to 1 with insulated ends obeys ``du/dt = d/dx (k du/dx)``.  On cells of
    width h, an implicit Euler step of length dt solves ``M u(t) = u(t - dt)`` with ``M = 1 + dt / h^2 D' diag(k) D``,
    where D takes differences of neighbours.  The parameters are log k between neighbours, so that k stays positive.

    The adjoint carries the errors of the sensors from the last time to the first, ``M a(t) = a(t + dt) + errors(t)``,
    and the derivative of the loss by k is the sum of ``-dt / h^2 (D a)(D u)`` over the steps.

    Parameters
    ----------
    cells : int
        Cells of the rod, a multiple of twice the sensors.
    steps : int
        Steps from one measurement to the next.
    roughness : float
        Half of this times the mean squared slope of log k is added to the loss: noise must not become structure.
    """

    def __init__(self, cells: int = 64, steps: int = 10, roughness: float = 1e-6) -> None:
        self._cells, self._steps, self._roughness = cells, steps, roughness
        self._factor = DURATION / (TIMES * steps) * cells**2  # dt / h^2
        self._sensing = np.zeros((cells, SENSORS))  # a sensor measures the mean of the cells beside it
        for sensor in range(SENSORS):
            right = (2 * sensor + 1) * cells // (2 * SENSORS)
            self._sensing[right - 1 : right + 1, sensor] = 0.5
        self.parameters = {"log_conductivity": np.zeros(cells - 1)}

    def loss_and_gradient(self, parameters: NamedArrays, batch: Samples) -> tuple[float, NamedArrays]:
        """Return half the mean squared error of a measurement with the roughness, and its gradient."""
        profile = np.asarray(parameters["log_conductivity"], float)
        inverse = self._inverse(profile)
        temperatures = self._temperatures(inverse, batch.inputs)
        errors = self._measured(temperatures) - batch.targets
        slopes = np.diff(profile) * self._cells
        loss = (errors**2).mean() / 2 + self._roughness * (slopes**2).mean() / 2

        sources = (errors / errors.size).reshape(-1, TIMES, SENSORS)
        adjoint, by_conductivity = np.zeros_like(temperatures[0]), np.zeros_like(profile)
        for step in range(TIMES * self._steps, 0, -1):
            if step % self._steps == 0:
                adjoint += sources[:, step // self._steps - 1] @ self._sensing.T
            adjoint = adjoint @ inverse  # which is symmetric
            by_conductivity -= self._factor * (np.diff(adjoint) * np.diff(temperatures[step])).sum(axis=0)
        gradient = np.exp(profile) * by_conductivity
        pull = self._roughness * self._cells * slopes / slopes.size
        gradient[1:] += pull
        gradient[:-1] -= pull
        return float(loss), {"log_conductivity": gradient}

    def evaluate(self, parameters: NamedArrays, batch: Samples) -> float:
        """Return half the mean squared error of a measurement, without the roughness."""
        return float(((self.predict(parameters, batch.inputs) - batch.targets) ** 2).mean() / 2)

    def predict(self, parameters: NamedArrays, inputs: np.ndarray) -> Any:
        """Return the measurements (samples, times x sensors) after pulses (samples, 2), their positions and heat."""
        inverse = self._inverse(np.asarray(parameters["log_conductivity"], float))
        return self._measured(self._temperatures(inverse, inputs))

    def _inverse(self, profile: np.ndarray) -> np.ndarray:
        """Return the inverse of M, which all steps of all experiments have in common."""
        differences = np.diff(np.eye(self._cells), axis=0)
        stiffness = differences.T @ (np.exp(profile)[:, None] * differences)
        return np.linalg.inv(np.eye(self._cells) + self._factor * stiffness)

    def _temperatures(self, inverse: np.ndarray, inputs: np.ndarray) -> list[np.ndarray]:
        """Return the temperatures (samples, cells) after each step, the first ones right after the pulse."""
        middles = (np.arange(self._cells) + 0.5) / self._cells
        pulse = np.exp(-(((middles - inputs[:, :1]) / WIDTH) ** 2) / 2)
        found = [inputs[:, 1:] * pulse / pulse.mean(axis=1, keepdims=True)]
        for _ in range(TIMES * self._steps):
            found.append(found[-1] @ inverse)
        return found

    def _measured(self, temperatures: list[np.ndarray]) -> np.ndarray:
        """Return what the sensors measure, (samples, times x sensors)."""
        return np.concatenate([each @ self._sensing for each in temperatures[self._steps :: self._steps]], axis=1)


def true_log_conductivity(x: np.ndarray) -> np.ndarray:
    """Return that of the rod that is measured, at some positions: an insulating layer, and one that conducts well."""
    return -1.2 * np.exp(-(((x - 0.3) / 0.06) ** 2)) + 0.8 / (1 + np.exp((abs(x - 0.72) - 0.12) / 0.015))


def write_experiments(directory: Path) -> None:
    """Write heat-train.h5 and heat-test.h5 into a directory, from a simulation on a finer grid than is learned on."""
    random, fine = np.random.default_rng(1), Rod(cells=256, steps=40)
    truth = {"log_conductivity": true_log_conductivity(np.arange(1, 256) / 256)}
    directory.mkdir(exist_ok=True)
    for name, count in (("train", 400), ("test", 100)):
        pulses = np.stack([random.uniform(0, 1, count), random.uniform(0.5, 1.5, count)], axis=1).astype(np.float32)
        with h5py.File(directory / f"heat-{name}.h5", "w") as file:
            measured = fine.predict(truth, pulses)
            file["inputs"], file["targets"] = pulses, measured + random.normal(0, NOISE, measured.shape)


def draw(checkpoint: Path, picture: Path) -> None:
    """Draw the conductivity in a checkpoint beside the true one."""
    import matplotlib as mpl

    mpl.use("Agg")  # no window
    import matplotlib.pyplot as plt

    with h5py.File(checkpoint) as file:
        profile = file["parameters/log_conductivity"][()]
    x = np.arange(1, len(profile) + 1) / (len(profile) + 1)
    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    axes.plot(x, np.exp(true_log_conductivity(x)), "k--", label="true")
    axes.plot(x, np.exp(profile), label="recovered")
    axes.plot((np.arange(SENSORS) + 0.5) / SENSORS, np.zeros(SENSORS), "^", color="tab:red", label="sensors")
    axes.set(xlabel="position in the rod", ylabel="conductivity", xlim=(0, 1), ylim=(-0.05, None))
    axes.legend()
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    if sys.argv[1:]:
        draw(Path(sys.argv[1]), Path("heat.png"))
    else:
        write_experiments(Path("data"))
