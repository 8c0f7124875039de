"""PyTorch's own operators for a layer, as a contestant.

layers.py THREADS BATCH KIND CHANNELS ROWS COLUMNS SIZE STRIDE MAPS
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import serve, timed

FLOOR = 0.01

Operator = Callable[[torch.Tensor], torch.Tensor]


def operators(layer: str, size: int, stride: int, shape: tuple[int, ...]) -> Operator:
    """Return a layer without parameters as one writes it with PyTorch."""
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


def filters(layer: str, size: int, stride: int, shape: tuple[int, ...], maps: int) -> tuple[Operator, torch.Tensor]:
    """Return a layer of filters as one writes it with PyTorch, and its weights."""
    if layer == "convolution":
        # The samples' maps innermost: oneDNN's own order, and the faster one on these shapes.
        weights = torch.randn(maps, shape[0], size, size) * 0.01
        weights = weights.contiguous(memory_format=torch.channels_last).requires_grad_()
        bias = torch.zeros(maps, requires_grad=True)
        return lambda inputs: functional.conv2d(inputs, weights, bias, stride), weights
    assert layer == "local"
    places = ((shape[1] - size) // stride + 1) * ((shape[2] - size) // stride + 1)
    weights = (torch.randn(places, shape[0] * size**2, maps) * 0.01).requires_grad_()
    return lambda inputs: torch.bmm(functional.unfold(inputs, size, stride=stride).permute(2, 0, 1), weights), weights


def main() -> None:
    threads, batch = map(int, sys.argv[1:3])
    layer, (*shape, size, stride, maps) = sys.argv[3], map(int, sys.argv[4:10])
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    inputs, leaves = torch.randn(batch, *shape), []
    if maps:
        compute, weights = filters(layer, size, stride, tuple(shape), maps)
        leaves.append(weights)
        if layer == "convolution":
            inputs = inputs.contiguous(memory_format=torch.channels_last)
    else:
        compute = operators(layer, size, stride, tuple(shape))
    leaves.append(inputs.requires_grad_())
    gradient = torch.ones_like(compute(inputs).detach())

    def forward_and_backward() -> None:
        for leaf in leaves:
            leaf.grad = None
        compute(inputs).backward(gradient)

    serve(step=timed(forward_and_backward))


if __name__ == "__main__":
    main()
