"""What one writes with PyTorch for a layer or a loss of ours, as a contestant: layers.py THREADS BATCH CASE.

CASE is a JSON list: kind, inputs of a sample, size, stride, maps, activation (`Case` in one_layer.py).
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import serve, timed
from one_layer import LOSSES, PENALTY, POOLS, RECONSTRUCTIONS, Case

FLOOR = 0.01
ACTIVATIONS = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu, "linear": lambda sums: sums}

Operator = Callable[[torch.Tensor], torch.Tensor]


def operator(case: Case) -> Operator:
    """Return a layer without parameters."""
    size, stride = case.size, case.stride
    if case.kind == "l2":
        return lambda inputs: functional.lp_pool2d(inputs, 2.0, size, stride)
    if case.kind == "average":
        return lambda inputs: functional.avg_pool2d(inputs, size, stride)
    if case.kind == "max":
        return lambda inputs: functional.max_pool2d(inputs, size, stride)
    if case.kind == "dropout":
        return lambda inputs: functional.dropout(inputs, 0.5)
    assert case.kind == "normalisation"
    offsets = torch.arange(size) - size // 2
    gaussian = torch.exp(-0.5 * (offsets / (0.25 * size)) ** 2)
    weights = torch.outer(gaussian, gaussian)[None, None]
    inside = functional.conv2d(torch.ones(1, 1, *case.inputs[1:]), weights, padding=size // 2)

    def local_mean(values: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(values.mean(1, keepdim=True), weights, padding=size // 2) / inside

    def normalise(inputs: torch.Tensor) -> torch.Tensor:
        centred = inputs - local_mean(inputs)
        return centred / torch.sqrt(local_mean(centred**2)).clamp(min=FLOOR)

    return normalise


def products(case: Case) -> tuple[Operator, list[torch.Tensor]]:
    """Return a layer with parameters, and these."""
    activation = ACTIVATIONS[case.activation]
    if case.kind == "dense":
        linear = torch.nn.Linear(case.inputs[0], case.maps)
        return lambda inputs: activation(linear(inputs)), list(linear.parameters())
    if case.kind == "convolution":
        weights, bias = convolution_parameters(case)
        return lambda inputs: activation(functional.conv2d(inputs, weights, bias, case.stride)), [weights, bias]
    assert case.kind == "local"
    weights = local_weights(case)

    def compute(inputs: torch.Tensor) -> torch.Tensor:
        fields = functional.unfold(inputs, case.size, stride=case.stride).permute(2, 0, 1)
        return activation(torch.bmm(fields, weights))

    return compute, [weights]


def convolution_parameters(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Return filters, of which the samples' maps are innermost: oneDNN's own order, and the faster one; and biases."""
    weights = torch.randn(case.maps, case.inputs[0], case.size, case.size) * 0.01
    weights = weights.contiguous(memory_format=torch.channels_last).requires_grad_()
    return weights, torch.zeros(case.maps, requires_grad=True)


def places(case: Case) -> tuple[int, int]:
    """Return the rows and columns of a layer of filters."""
    rows, columns = ((inputs - case.size) // case.stride + 1 for inputs in case.inputs[1:])
    return rows, columns


def local_weights(case: Case) -> torch.Tensor:
    """Return the filters of each place."""
    rows, columns = places(case)
    shape = (rows * columns, case.inputs[0] * case.size**2, case.maps)
    return (torch.randn(shape) * 0.01).requires_grad_()


def loss(case: Case, batch: int) -> tuple[Operator, torch.Tensor]:
    """Return a loss, and the outputs of a last layer."""
    outputs = torch.randn(batch, *case.inputs, requires_grad=True)
    classes = torch.randint(case.inputs[0], (batch,))
    values = torch.rand(outputs.shape)
    if case.kind == "softmax":
        return lambda outputs: functional.cross_entropy(outputs, classes), outputs
    if case.kind == "squared":
        return lambda outputs: functional.mse_loss(outputs, values, reduction="sum") / (2 * batch), outputs
    logistic = functional.binary_cross_entropy_with_logits
    if case.kind == "logistic":
        return lambda outputs: logistic(outputs, values, reduction="sum") / batch, outputs
    assert case.kind == "one-vs-all"

    def of_labels(outputs: torch.Tensor) -> torch.Tensor:
        # It takes no labels: whoever has them writes out a target for each output, for every batch.
        targets = torch.zeros_like(outputs).scatter_(1, classes[:, None], 1.0)
        return logistic(outputs, targets, reduction="sum") / batch

    return of_labels, outputs


def reconstruction(case: Case, batch: int) -> tuple[Operator, list[torch.Tensor]]:
    """Return the objective of a stage that learns without targets, and its parameters."""

    def objective(inputs: torch.Tensor, maps: torch.Tensor, estimate: torch.Tensor) -> torch.Tensor:
        error = ((estimate - inputs) ** 2).sum()
        return (error + PENALTY * functional.lp_pool2d(maps, 2.0, POOLS, 1).sum()) / batch

    if case.kind.startswith("convolution"):
        weights, bias = convolution_parameters(case)
        decoder, _ = convolution_parameters(case)

        def tied(inputs: torch.Tensor) -> torch.Tensor:
            maps = functional.conv2d(inputs, weights, bias, case.stride)
            return objective(inputs, maps, functional.conv_transpose2d(maps, decoder, stride=case.stride))

        return tied, [weights, bias, decoder]
    weights, decoder = local_weights(case), local_weights(case)
    bias = torch.zeros(len(weights), 1, case.maps, requires_grad=True)

    def untied(inputs: torch.Tensor) -> torch.Tensor:
        fields = functional.unfold(inputs, case.size, stride=case.stride).permute(2, 0, 1)
        codes = torch.bmm(fields, weights) + bias
        estimates = torch.bmm(codes, decoder.transpose(1, 2)).permute(1, 2, 0)
        estimate = functional.fold(estimates, case.inputs[1:], case.size, stride=case.stride)
        return objective(inputs, codes.permute(1, 2, 0).reshape(batch, case.maps, *places(case)), estimate)

    return untied, [weights, bias, decoder]


def main() -> None:
    threads, batch = map(int, sys.argv[1:3])
    case = Case(*json.loads(sys.argv[3]))
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    if case.kind in LOSSES:
        compute, inputs = loss(case, batch)
        leaves = [inputs]
    else:
        inputs, leaves = torch.randn(batch, *case.inputs), []
        if case.kind.startswith("convolution"):
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        if case.kind in RECONSTRUCTIONS:
            compute, leaves = reconstruction(case, batch)
        else:
            compute, leaves = products(case) if case.maps else (operator(case), [])
            leaves.append(inputs.requires_grad_())
    gradient = torch.ones_like(compute(inputs).detach())

    def forward_and_backward() -> None:
        for leaf in leaves:
            leaf.grad = None
        compute(inputs).backward(gradient)

    serve(step=timed(forward_and_backward))


if __name__ == "__main__":
    main()
