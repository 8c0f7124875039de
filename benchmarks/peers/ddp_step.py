"""PyTorch's DistributedDataParallel over gloo on the speech network: ddp_step.py BATCH STEPS [PRECISION].

A contestant.  PRECISION is float32, or bfloat16: then the forward pass is under autocast to it.
Two processes of one thread each; an action is that many steps of both.
"""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import free_port, serve, timed

SIZES = (440, 2560, 2560, 2560, 2560, 8192)


def main() -> None:
    batch, steps = map(int, sys.argv[1:3])
    rounds = sys.argv[3:] == ["bfloat16"]
    torch.set_num_threads(1)
    torch.manual_seed(1)
    other = None
    if "RANK" not in os.environ:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
        other = subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, "RANK": "1"})
        os.environ["RANK"] = "0"
    dist.init_process_group("gloo")
    modules: list[torch.nn.Module] = []
    for inputs, outputs in pairwise(SIZES):
        modules += [torch.nn.Linear(inputs, outputs), torch.nn.Sigmoid()]
    network = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(*modules[:-1]))
    rule = torch.optim.SGD(network.parameters(), lr=0.01)
    samples, classes = torch.randn(batch, SIZES[0]), torch.randint(SIZES[-1], (batch,))

    def work() -> None:
        dist.broadcast(torch.zeros(1), 0)  # both begin together
        for _ in range(steps):
            rule.zero_grad(set_to_none=True)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=rounds):
                loss = torch.nn.functional.cross_entropy(network(samples), classes)
            loss.backward()
            rule.step()

    if other is None:
        while True:  # until the first process ends this one
            work()
    serve(steps=timed(work))
    other.kill()
    other.wait()


if __name__ == "__main__":
    main()
