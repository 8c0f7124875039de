"""Full-batch training by torch.optim.LBFGS or SciPy's L-BFGS-B, as a contestant: full_batch.py METHOD DATA.npz GOAL.

Both take loss and gradient from PyTorch on two threads, in chunks of 5,000 samples, which is faster than all at once.
"""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import serve

CHUNK = 5000
PAIRS = 10


class Reached(Exception):
    """The loss is as low as it was to be."""


class Problem:
    """Loss and gradient of the network, until the goal is reached."""

    def __init__(self, path: str, goal: float) -> None:
        arrays = np.load(path)
        self.goal, self.evaluations = goal, 0
        self.inputs, self.targets = torch.from_numpy(arrays["inputs"]), torch.from_numpy(arrays["targets"])
        self.start = [torch.from_numpy(arrays[name]) for name in arrays.files if "/" in name]
        weights = [one.shape for one in self.start if one.ndim == 2]
        layers: list[torch.nn.Module] = []
        for units, inputs in weights:
            layers += [torch.nn.Linear(inputs, units), torch.nn.Tanh()]
        self.network = torch.nn.Sequential(*layers[:-1])
        self.parameters = list(self.network.parameters())
        self.loss = torch.nn.CrossEntropyLoss(reduction="sum")

    def begin(self) -> None:
        """Go back to the first parameters."""
        self.evaluations = 0
        with torch.no_grad():
            for parameter, first in zip(self.parameters, self.start, strict=True):
                parameter.copy_(first)

    def evaluate(self) -> torch.Tensor:
        """Return the mean loss, with its gradient in the parameters."""
        for parameter in self.parameters:
            parameter.grad = None
        total = torch.zeros(())
        for first in range(0, len(self.targets), CHUNK):
            part = slice(first, first + CHUNK)
            loss = self.loss(self.network(self.inputs[part]), self.targets[part]) / len(self.targets)
            loss.backward()
            total += loss.detach()
        self.evaluations += 1
        if float(total) <= self.goal:
            raise Reached
        return total


def by_torch(problem: Problem) -> None:
    many = 10_000
    method = torch.optim.LBFGS(
        problem.parameters,
        max_iter=many,
        max_eval=many,
        history_size=PAIRS,
        tolerance_grad=0,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )
    method.step(problem.evaluate)


def by_scipy(problem: Problem) -> None:
    from scipy import optimize

    def function(x: np.ndarray) -> tuple[float, np.ndarray]:
        torch.nn.utils.vector_to_parameters(torch.from_numpy(x.astype(np.float32)), problem.parameters)
        loss = problem.evaluate()
        gradient = torch.cat([parameter.grad.reshape(-1) for parameter in problem.parameters])
        return float(loss), gradient.numpy().astype(np.float64)

    start = torch.nn.utils.parameters_to_vector(problem.parameters).detach().numpy().astype(np.float64)
    options = {"maxcor": PAIRS, "maxiter": 10_000, "maxfun": 10_000, "ftol": 0, "gtol": 0}
    optimize.minimize(function, start, jac=True, method="L-BFGS-B", options=options)


def main() -> None:
    method, path, goal = sys.argv[1:]
    torch.set_num_threads(2)
    problem = Problem(path, float(goal))

    def step() -> Mapping[str, Any]:
        problem.begin()
        began = time.perf_counter()
        try:
            (by_torch if method == "torch" else by_scipy)(problem)
        except Reached:
            return {"seconds": time.perf_counter() - began, "evaluations": problem.evaluations}
        raise RuntimeError(f"{method} ended before the loss was {goal}")

    serve(step=step)


if __name__ == "__main__":
    main()
