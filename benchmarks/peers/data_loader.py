"""Samples a second of a small network in PyTorch that learns from an HDF5 file by way of a DataLoader.

    python data_loader.py FILE WORKERS BATCHES

Each sample is read by h5py, as a map-style dataset does.
"""

from __future__ import annotations

import itertools
import sys
import time

import h5py
import torch


class Samples(torch.utils.data.Dataset):
    """The rows of a file, which each worker opens for itself."""

    def __init__(self, path: str) -> None:
        self._path, self._file = path, None
        with h5py.File(path) as file:
            self._count = len(file["inputs"])

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if self._file is None:
            self._file = h5py.File(self._path)
        return torch.from_numpy(self._file["inputs"][index]), int(self._file["targets"][index])


def main() -> None:
    path, workers, batches = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    data = Samples(path)
    features = data[0][0].numel()
    network = torch.nn.Sequential(torch.nn.Linear(features, 16), torch.nn.Tanh(), torch.nn.Linear(16, 10))
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    loader = torch.utils.data.DataLoader(data, 128, shuffle=True, num_workers=workers)
    began = 0.0
    for number, (inputs, targets) in enumerate(itertools.islice(loader, batches + 4)):
        if number == 4:
            began = time.perf_counter()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(inputs), targets).backward()
        optimizer.step()
    print(128 * batches / (time.perf_counter() - began))


if __name__ == "__main__":
    main()
