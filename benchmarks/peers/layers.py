"""PyTorch's own operators for a layer, as a contestant: layers.py THREADS BATCH LAYER MAPS ROWS COLUMNS SIZE STRIDE."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import serve, timed

FLOOR = 0.01


def operators(layer: str, size: int, stride: int, shape: tuple[int, ...]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a layer as one writes it with PyTorch."""
    if layer == "l2":
        return lambda inputs: functional.lp_pool2d(inputs, 2.0, size, stride)
    if layer == "average":
        return lambda inputs: functional.avg_pool2d(inputs, size, stride)
    if layer == "max":
        return lambda inputs: functional.max_pool2d(inputs, size, stride)
    if layer == "dropout":
        return lambda inputs: functional.dropout(inputs, 0.5)
    assert layer == "normalisation"
    offsets = torch.arange(size) - size // 2
    gaussian = torch.exp(-0.5 * (offsets / (0.25 * size)) ** 2)
    weights = torch.outer(gaussian, gaussian)[None, None]
    inside = functional.conv2d(torch.ones(1, 1, *shape[1:]), weights, padding=size // 2)

    def local_mean(values: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(values.mean(1, keepdim=True), weights, padding=size // 2) / inside

    def normalise(inputs: torch.Tensor) -> torch.Tensor:
        centred = inputs - local_mean(inputs)
        return centred / torch.sqrt(local_mean(centred**2)).clamp(min=FLOOR)

    return normalise


def main() -> None:
    threads, batch = map(int, sys.argv[1:3])
    layer, (*shape, size, stride) = sys.argv[3], map(int, sys.argv[4:9])
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    compute = operators(layer, size, stride, tuple(shape))
    inputs = torch.randn(batch, *shape, requires_grad=True)
    gradient = torch.ones_like(compute(inputs))

    def forward_and_backward() -> None:
        inputs.grad = None
        compute(inputs).backward(gradient)

    serve(step=timed(forward_and_backward))


if __name__ == "__main__":
    main()
