"""A convolutional network in PyTorch as an objective, which dbmpi trains from its own data files and checkpoints."""

from __future__ import annotations

import torch
from torch import nn

import dbmpi.torch


class Cnn(dbmpi.torch.ModuleObjective):
    """Two convolutions and two dense layers for square images, and the cross-entropy of their classes.

    Parameters
    ----------
    side, classes : int
        Pixels of a row of an image, a multiple of 4; and how many classes there are.
    maps : int
        Of the first convolution; the second has twice as many.
    seed : int
        Of the first values, which must be the same on all ranks.
    """

    def __init__(self, side: int = 8, classes: int = 10, maps: int = 16, seed: int = 1) -> None:
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Unflatten(1, (1, side)),
            *(nn.Conv2d(1, maps, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(maps, 2 * maps, 3, padding=1), nn.GroupNorm(4, 2 * maps), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(2 * maps * (side // 4) ** 2, 64), nn.ReLU(), nn.Dropout(0.2)),
            nn.Linear(64, classes),
        )
        super().__init__(network, nn.functional.cross_entropy)
