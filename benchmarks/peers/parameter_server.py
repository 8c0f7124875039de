"""A parameter server in torch.distributed (gloo), as a contestant: push + plain SGD + fetch of 41,777,152 floats.

The worker sends the gradient, the server adds it to the weights and sends them back, each process with one thread.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import free_port, serve, timed

FLOATS = 41_777_152
WORKER, SERVER = 0, 1


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:] == ["--server"]:
        server()
        return
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    other = subprocess.Popen([sys.executable, __file__, "--server"], env={**os.environ, "RANK": str(SERVER)})
    os.environ["RANK"] = str(WORKER)
    dist.init_process_group("gloo")
    weights, gradient = torch.zeros(FLOATS), torch.ones(FLOATS)

    def step() -> None:
        dist.send(gradient, SERVER)
        dist.recv(weights, SERVER)

    serve(step=timed(step))
    other.kill()
    other.wait()


def server() -> None:
    """Apply gradients until the worker ends this process."""
    dist.init_process_group("gloo")
    weights, gradient = torch.zeros(FLOATS), torch.zeros(FLOATS)
    while True:
        dist.recv(gradient, WORKER)
        weights.add_(gradient, alpha=-0.01)
        dist.send(weights, WORKER)


if __name__ == "__main__":
    main()
