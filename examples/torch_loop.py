"""Train a small convolutional network on handwritten digits, in plain PyTorch.

``torch_downpour.py`` is the same by Downpour on any number of ranks.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset


def main() -> None:
    """Train, and print the accuracy on the last 297 digits."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    samples = TensorDataset(images, labels)
    layers = nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 64), nn.ReLU(), nn.Linear(64, 10)
    model = nn.Sequential(*layers)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.01)
    train = Subset(samples, range(1500))
    for _ in range(10):
        for x, y in DataLoader(train, batch_size=32, shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    with torch.no_grad():
        accuracy = (model(images[1500:]).argmax(1) == labels[1500:]).float().mean()
    print(f"accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
