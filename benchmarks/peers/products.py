"""PyTorch's products of bfloat16 matrices as a contestant: products.py THREADS UNITS INPUTS BATCH."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import repeated, serve


def main() -> None:
    threads, units, inputs, batch = map(int, sys.argv[1:5])
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    shapes = {"weights": (units, inputs), "inputs": (batch, inputs), "gradient": (batch, units)}
    matrix = {name: torch.randn(shape).to(torch.bfloat16) for name, shape in shapes.items()}
    linear = torch.nn.functional.linear
    with torch.no_grad():
        serve(
            forward=repeated(lambda: linear(matrix["inputs"], matrix["weights"])),
            inputs=repeated(lambda: linear(matrix["gradient"], matrix["weights"].T)),
            weights=repeated(lambda: linear(matrix["gradient"].T, matrix["inputs"].T)),
        )


if __name__ == "__main__":
    main()
