"""PyTorch's training step of the speech network, as a contestant: speech_step.py THREADS BATCH [PRECISION].

PRECISION is float32, or bfloat16: then the forward pass is under autocast to it.
"""

import sys
from itertools import pairwise
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import serve, timed


def main() -> None:
    threads, batch = map(int, sys.argv[1:3])
    rounds = sys.argv[3:] == ["bfloat16"]
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    sizes = (440, 2560, 2560, 2560, 2560, 8192)
    modules: list[torch.nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        modules.append(torch.nn.Linear(inputs, outputs))
        modules.append(torch.nn.Sigmoid())
    network = torch.nn.Sequential(*modules[:-1])
    assert sum(tensor.numel() for tensor in network.parameters()) == 41_777_152
    rule = torch.optim.SGD(network.parameters(), lr=0.01)
    inputs = torch.randn(batch, sizes[0])
    classes = torch.randint(sizes[-1], (batch,))

    def step() -> None:
        rule.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=rounds):
            loss = torch.nn.functional.cross_entropy(network(inputs), classes)
        loss.backward()
        rule.step()

    serve(step=timed(step))


if __name__ == "__main__":
    main()
