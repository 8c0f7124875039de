"""Train a small convolutional network on images, in PyTorch by Downpour.

Run it with ``dbmpi launch -n 3 -- python images_downpour.py``, on one shard and two workers, or in one process with
``python images_downpour.py``.  ``images_loop.py`` is the same in plain PyTorch.
"""

import argparse
import gzip
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import dbmpi.torch


class Net(nn.Module):
    """Two convolutions, each with pooling, and two dense layers."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        )
        self.classes = nn.Sequential(nn.Linear(32 * (side // 4) ** 2, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return a score for each class."""
        return self.classes(self.features(images).flatten(1))


def read(path: Path, header: int) -> np.ndarray:
    """Return the bytes of a file of MNIST behind its header."""
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


def load(directory: Path | None) -> list[TensorDataset]:
    """Return the samples to learn from and those to test on."""
    if directory is None:
        digits = load_digits()
        images, labels = torch.tensor(digits.images / 16).float()[:, None], torch.tensor(digits.target)
        return [TensorDataset(images[part], labels[part]) for part in (slice(1500), slice(1500, None))]
    found = []
    for name in ("train", "t10k"):
        pixels = read(directory / f"{name}-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)
        classes = read(directory / f"{name}-labels-idx1-ubyte.gz", 8)
        found.append(TensorDataset(torch.tensor(pixels) / 255, torch.tensor(classes).long()))
    return found


def accuracy(model: nn.Module, samples: Dataset) -> float:
    """Return the fraction of the samples that are classified correctly."""
    with torch.no_grad():
        right = [(model(images).argmax(1) == labels).float() for images, labels in DataLoader(samples, batch_size=500)]
    return float(torch.cat(right).mean())


def main() -> None:
    """Train, print the accuracy on the test samples after each epoch, and save the model if that is wanted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, help="directory with the files of MNIST or Fashion-MNIST")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--save", type=Path, help="file for the parameters")
    arguments = parser.parse_args()
    train, test = load(arguments.images)
    model = Net(train[0][0].shape[-1])
    optimizer = dbmpi.torch.Downpour(model.parameters(), rule="adagrad", learning_rate=0.01)
    train = torch.utils.data.Subset(train, range(optimizer.worker, len(train), optimizer.workers))
    batches = DataLoader(train, batch_size=32, shuffle=True)
    for epoch in range(arguments.epochs):
        for images, labels in batches:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: accuracy {accuracy(model, test):.3f}")
    if arguments.save and optimizer.worker == 0:
        torch.save(model.state_dict(), arguments.save)


if __name__ == "__main__" and not dbmpi.serve(shards=1):
    main()
