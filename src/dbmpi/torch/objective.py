"""A module of PyTorch as an objective, to train it by Downpour or Sandblaster with dbmpi's data and checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch.nn.modules.batchnorm import _NormBase

from dbmpi.errors import UserError
from dbmpi.machine import threads
from dbmpi.objective import NamedArrays, Samples


class ModuleObjective:
    """The loss of a module of PyTorch and its gradient, for ``dbmpi.train(run, objective=...)``.

    While a gradient is computed, the module's parameters are views of the vector that was fetched; autograd's gradients
    are copied once, to where they are pushed from.  Frozen parameters, which require no gradient, keep their values and
    are not part of checkpoints.  A parameter that is used in several places counts once.

    The random numbers of a step, as those of dropout, follow from its number alone.  PyTorch gets as many threads as
    dbmpi's own kernels.

    Parameters
    ----------
    module : torch.nn.Module
        On the CPU, its parameters of float32.
    loss : callable
        ``loss(outputs, targets)`` returns the mean loss of the batch, e.g. ``torch.nn.functional.cross_entropy``; with
        ``data.weights`` it is called with the weights as a third argument.  Targets are int64 (samples,) for classes,
        or float32 (samples, outputs).

    Raises
    ------
    UserError
        If a parameter is on another device or of another dtype, none is to be trained, or a layer keeps running
        statistics, which are no parameters and would be missing in checkpoints.

    Examples
    --------
    >>> import torch
    >>> import dbmpi.torch
    >>> objective = dbmpi.torch.ModuleObjective(torch.nn.Linear(4, 2), torch.nn.functional.cross_entropy)
    >>> sorted(objective.parameters)
    ['bias', 'weight']
    """

    def __init__(self, module: torch.nn.Module, loss: Callable[..., torch.Tensor]) -> None:
        self.module, self._loss = module, loss
        self._trained = {name: one for name, one in module.named_parameters() if one.requires_grad}
        if not self._trained:
            raise UserError("ModuleObjective: the module has no parameter that requires a gradient")
        for name, one in module.named_parameters():
            if one.device.type != "cpu" or one.dtype != torch.float32:
                raise UserError(
                    f"ModuleObjective: {name} is {one.dtype} on the device {one.device}: expected float32 on the CPU; "
                    "use module.to('cpu', torch.float32)"
                )
        for name, layer in module.named_modules():
            if isinstance(layer, _NormBase) and layer.track_running_stats:
                raise UserError(
                    f"ModuleObjective: {name or 'the module'} keeps running statistics, which are no parameters and "
                    "not in checkpoints: give it track_running_stats=False, or use a GroupNorm or LayerNorm"
                )
        self.parameters: NamedArrays = {name: one.detach().numpy().copy() for name, one in self._trained.items()}
        """First values, by name."""
        limit = threads.prepare().threads
        if torch.get_num_threads() > limit:
            torch.set_num_threads(limit)

    def loss_and_gradient(self, parameters: NamedArrays, batch: Samples) -> tuple[float, NamedArrays]:
        """Return the mean loss of a `batch` at the `parameters`, and autograd's gradient."""
        self._move_to(parameters)
        self.module.train()
        torch.manual_seed(batch.step)
        for one in self._trained.values():
            one.grad = None
        loss = self._mean_loss(self.module(_tensor(batch.inputs)), batch)
        loss.backward()
        gradients = {
            name: np.zeros(one.shape, np.float32) if one.grad is None else one.grad.to_dense().numpy()
            for name, one in self._trained.items()
        }
        return float(loss), gradients

    def evaluate(self, parameters: NamedArrays, batch: Samples) -> float | tuple[float, int]:
        """Return the mean loss of a `batch` at the `parameters`; for classes also how many are correct."""
        outputs = self._outputs(parameters, batch.inputs)
        with torch.no_grad():
            loss = float(self._mean_loss(outputs, batch))
            if batch.targets.dtype.kind != "i" or outputs.ndim != 2:
                return loss
            return loss, int((outputs.argmax(dim=1) == _tensor(batch.targets)).sum())

    def predict(self, parameters: NamedArrays, inputs: np.ndarray) -> np.ndarray:
        """Return the module's outputs at the `parameters` for some `inputs`, (samples, ...)."""
        outputs: np.ndarray = self._outputs(parameters, inputs).numpy()
        return outputs

    def _outputs(self, parameters: NamedArrays, inputs: np.ndarray) -> torch.Tensor:
        """Return the outputs without dropout and the like."""
        self._move_to(parameters)
        self.module.train(False)
        with torch.no_grad():
            return self.module(_tensor(inputs))

    def _mean_loss(self, outputs: torch.Tensor, batch: Samples) -> torch.Tensor:
        weights = () if batch.weights is None else (_tensor(batch.weights),)
        targets = _tensor(batch.targets)
        return self._loss(outputs, targets.long() if targets.dtype == torch.int32 else targets, *weights)

    def _move_to(self, parameters: NamedArrays) -> None:
        """Let the module's parameters be views of other arrays, where they are not yet."""
        for name, one in self._trained.items():
            array = parameters[name]
            if one.data_ptr() != array.ctypes.data:
                with warnings.catch_warnings():  # of arrays that are read-only: nothing here writes into parameters
                    warnings.simplefilter("ignore")
                    one.data = torch.from_numpy(array)


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
