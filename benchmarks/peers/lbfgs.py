"""One iteration of torch.optim.LBFGS without its evaluation, as a contestant: lbfgs.py THREADS SIZE PAIRS."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import serve


def main() -> None:
    threads, size, pairs = map(int, sys.argv[1:4])
    torch.set_num_threads(threads)
    curvatures = torch.logspace(0, 4, size)
    parameters = torch.ones(size, requires_grad=True)
    parameters.grad = torch.empty(size)
    method = torch.optim.LBFGS([parameters], max_iter=1, history_size=pairs, tolerance_grad=0, tolerance_change=0)
    spent = 0.0

    def evaluate() -> torch.Tensor:
        nonlocal spent
        began = time.perf_counter()
        with torch.no_grad():
            torch.mul(parameters, curvatures, out=parameters.grad)
            loss = 0.5 * torch.dot(parameters, parameters.grad)
        spent += time.perf_counter() - began
        return loss

    def step() -> Mapping[str, Any]:
        nonlocal spent
        spent, began = 0.0, time.perf_counter()
        method.step(evaluate)
        return {"seconds": time.perf_counter() - began - spent}

    serve(step=step)


if __name__ == "__main__":
    main()
