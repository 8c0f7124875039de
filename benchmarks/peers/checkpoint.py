"""Write and read two tensors by PyTorch: half of each in one process, and a distributed checkpoint of two.

    python checkpoint.py FOLDER ELEMENTS

The second process of distributed checkpoints is started by the first one, and is told by what that reads.
"""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

FOLDER, ELEMENTS = Path(sys.argv[1]), int(sys.argv[2])
NAMES = ("parameters", "accumulator")


def bring_to_disk(*paths: Path) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def forget(*paths: Path) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main() -> None:
    warnings.filterwarnings("ignore")
    rank = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    if rank == 0:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
        other = subprocess.Popen([sys.executable, *sys.argv[:3], "1", str(port)])
    else:
        port = int(sys.argv[4])
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mine = {f"{name} {rank}": torch.rand(ELEMENTS // 2) for name in NAMES}
    actions = {name: functools.partial(work, mine, rank) for name, work in TOGETHER.items()}
    if rank == 1:
        follow(actions)
        return
    single = FOLDER / "torch.pt"

    def save() -> None:
        torch.save(mine, single)
        bring_to_disk(single)

    def together(name: str) -> None:
        dist.broadcast_object_list([name], 0)
        actions[name]()
        dist.barrier()

    work = {name: functools.partial(together, name) for name in actions}
    work |= {"torch.save": save, "torch.load": lambda: torch.load(single)}
    common.serve(**{name: timed(one) for name, one in work.items()})
    dist.broadcast_object_list([None], 0)
    other.wait()


def save_together(mine: dict[str, torch.Tensor], rank: int) -> None:
    dcp.save(mine, checkpoint_id=FOLDER / "distributed")
    bring_to_disk(*(FOLDER / "distributed").glob(f"__{rank}_*"))


def load_together(mine: dict[str, torch.Tensor], rank: int) -> None:
    dcp.load(mine, checkpoint_id=FOLDER / "distributed")


TOGETHER = {"distributed save": save_together, "distributed load": load_together}


def follow(actions: dict[str, functools.partial[None]]) -> None:
    """Do what the first process does."""
    while True:
        told = [None]
        dist.broadcast_object_list(told, 0)
        if told[0] is None:
            return
        actions[told[0]]()
        dist.barrier()


def timed(work):
    def action() -> dict[str, float]:
        forget(*FOLDER.glob("torch.pt"), *FOLDER.glob("distributed/*.distcp"))
        start = time.perf_counter()
        work()
        return {"seconds": time.perf_counter() - start}

    return action


if __name__ == "__main__":
    main()
