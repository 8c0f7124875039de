"""A module of PyTorch as an objective, to train it by Downpour or Sandblaster with dbmpi's data and checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from dbmpi.errors import UserError
from dbmpi.objective import Gradients, NamedArrays, Samples
from dbmpi.torch import process
from dbmpi.torch.apart import check_apart

_NUMBERS = {
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.float32, torch.float64),
}


def objective(module: torch.nn.Module, loss: Callable[..., torch.Tensor]) -> ModuleObjective:
    """Return the loss of a module of PyTorch and its gradient, for ``dbmpi.train(run, objective=...)``.

    Parameters
    ----------
    module, loss
        As for :class:`ModuleObjective`, which also says how they are used and what is refused.

    Examples
    --------
    >>> import torch
    >>> import dbmpi.torch
    >>> digits = dbmpi.torch.objective(torch.nn.Linear(64, 10), torch.nn.functional.cross_entropy)
    >>> sorted(digits.parameters)
    ['bias', 'weight']
    """
    return ModuleObjective(module, loss)


class ModuleObjective:
    """The loss of a module of PyTorch and its gradient; a base class for objectives that a configuration names.

    While a run goes on, the module's parameters are views of the vector that was fetched.  As soon as autograd has
    accumulated the gradient of a parameter, it is copied, once, to where it is pushed from, and its memory is freed.
    A parameter that is used in several places counts once; one without a gradient in some step is pushed zeros.

    Frozen parameters, which require no gradient, and buffers, such as the running statistics of batch normalisation,
    are the objective's :attr:`state`.  Each replica updates its own buffers; those of replica 0 are in checkpoints, and
    all replicas use them when they evaluate at the end and when they resume.

    Each step calls ``module.train()``, and each evaluation ``module.train(False)``, which set all modules inside: one
    that is to stay in its mode overrides ``train``.  After ``dbmpi.evaluate`` and ``dbmpi.predict``, the module has the
    values of the checkpoint, and is in evaluation mode.

    The random numbers of a step, as those of dropout, follow from its number alone.  PyTorch gets as many threads as
    dbmpi's own kernels.

    Parameters
    ----------
    module : torch.nn.Module
        On the CPU, its parameters of float32.  Learning begins at the values that it has.  It is called with the
        inputs (samples, ...): float32, uint8, or other integers as int64; of several inputs, with each as the argument
        of its name.
    loss : callable
        ``loss(outputs, targets)`` returns the mean loss of the batch, e.g. ``torch.nn.functional.cross_entropy``; with
        ``data.weights`` it is called with the weights as a third argument.  Targets are int64 (samples,) for classes,
        or float32 (samples, outputs).

    Raises
    ------
    UserError
        If a parameter or a buffer is on another device, a parameter is of another dtype, none is to be trained, or two
        different ones are at the same place in memory.

    Examples
    --------
    >>> import torch
    >>> import dbmpi.torch
    >>> class Digits(dbmpi.torch.ModuleObjective):
    ...     def __init__(self, units=100):
    ...         layers = torch.nn.Linear(64, units), torch.nn.Tanh(), torch.nn.Linear(units, 10)
    ...         super().__init__(torch.nn.Sequential(*layers), torch.nn.functional.cross_entropy)
    """

    def __init__(self, module: torch.nn.Module, loss: Callable[..., torch.Tensor]) -> None:
        self.module, self._loss = module, loss
        self._trained = {name: one for name, one in module.named_parameters() if one.requires_grad}
        if not self._trained:
            raise UserError("dbmpi.torch: the module has no parameter that requires a gradient")
        for name, one in module.named_parameters():
            if is_lazy(one):
                raise UserError(f"dbmpi.torch: {name} has no shape yet: call the module once with some samples before")
            if one.device.type != "cpu" or one.dtype != torch.float32:
                raise UserError(
                    f"dbmpi.torch: {name} is {one.dtype} on the device {one.device}: expected float32 on the CPU; "
                    "use module.to('cpu', torch.float32)"
                )
        check_apart(dict(module.named_parameters()), "dbmpi.torch")
        for name, one in module.named_buffers():
            if one.device.type != "cpu" or one.dtype not in _NUMBERS:
                raise UserError(
                    f"dbmpi.torch: the buffer {name} is {one.dtype} on the device {one.device}: expected numbers that "
                    "NumPy knows on the CPU; use module.to('cpu'), or another dtype"
                )
        for name, one in self._trained.items():
            one.register_post_accumulate_grad_hook(partial(self._hand_over, name))
        self._dtype = torch.float32
        self._gradients: Gradients | None = None
        self._left: dict[str, None] = {}
        process.limit_threads()

    @property
    def parameters(self) -> NamedArrays:
        """The values of the parameters that are trained, by name; views."""
        return {name: one.detach().numpy() for name, one in self._trained.items()}

    @property
    def state(self) -> NamedArrays:
        """Everything else in the module's ``state_dict``, frozen parameters and buffers, by name; views."""
        trained = {id(one) for one in self._trained.values()}
        return {
            name: one.detach().numpy()
            for name, one in self.module.state_dict(keep_vars=True).items()
            if isinstance(one, torch.Tensor) and id(one) not in trained
        }

    def write_gradient(self, parameters: NamedArrays, batch: Samples, gradients: Gradients) -> float:
        """Return the mean loss of a batch, and hand over autograd's gradients as they are accumulated.

        Parameters
        ----------
        parameters, batch, gradients
            As for any objective.
        """
        self._left = dict.fromkeys(reversed(self._trained))
        self._gradients = gradients
        try:
            loss = self._accumulate(parameters, batch)
        finally:
            self._gradients = None
        for name in self._left:
            gradients.ready(name, _gradient(self._trained[name]))
        return loss

    def loss_and_gradient(self, parameters: NamedArrays, batch: Samples) -> tuple[float, NamedArrays]:
        """Return the mean loss of a `batch` at the `parameters`, and autograd's gradient."""
        loss = self._accumulate(parameters, batch)
        return loss, {name: _gradient(one) for name, one in self._trained.items()}

    def close(self) -> None:
        """Give the parameters memory of the module's own, with the values that it last computed with."""
        for one in self._trained.values():
            one.data = one.data.clone()

    def evaluate(self, parameters: NamedArrays, batch: Samples) -> float | tuple[float, int]:
        """Return the mean loss of a `batch` at the `parameters`; for classes also how many are correct."""
        outputs = self._outputs(parameters, batch.inputs)
        with torch.no_grad():
            loss = float(self._mean_loss(outputs, batch))
            if batch.targets.dtype.kind != "i" or batch.targets.ndim != 1 or outputs.ndim != 2:
                return loss
            return loss, int((outputs.argmax(dim=1) == self._tensor(batch.targets)).sum())

    def predict(self, parameters: NamedArrays, inputs: Any) -> np.ndarray:
        """Return the module's outputs at the `parameters` for some `inputs`, (samples, ...)."""
        outputs: np.ndarray = self._outputs(parameters, inputs).numpy()
        return outputs

    def _accumulate(self, parameters: NamedArrays, batch: Samples) -> float:
        """Let autograd accumulate the gradient of a batch, and return its loss."""
        self._move_to(parameters)
        self.module.train()
        torch.manual_seed(batch.step)
        for one in self._trained.values():
            one.grad = None
        loss = self._mean_loss(self._call(batch.inputs), batch)
        loss.backward()
        return float(loss.detach())

    def _outputs(self, parameters: NamedArrays, inputs: Any) -> torch.Tensor:
        """Return the outputs without dropout and the like."""
        self._move_to(parameters)
        self.module.train(False)
        with torch.no_grad():
            return self._call(inputs)

    def _call(self, inputs: Any) -> torch.Tensor:
        """Return the module's outputs; of several inputs, each is the argument of its name."""
        if isinstance(inputs, dict):
            return self.module(**{name: self._tensor(array) for name, array in inputs.items()})
        return self.module(self._tensor(inputs))

    def _mean_loss(self, outputs: torch.Tensor, batch: Samples) -> torch.Tensor:
        weights = () if batch.weights is None else (self._tensor(batch.weights),)
        return self._loss(outputs, self._tensor(batch.targets), *weights)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        """Return an array as a module takes it: floats as the parameters are, and indices as int64."""
        if array.dtype.kind in "iu" and array.dtype != np.uint8:
            return torch.from_numpy(array.astype(np.int64))
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def _move_to(self, parameters: NamedArrays) -> None:
        """Let the module's parameters be views of other arrays, where they are not yet."""
        double = parameters[next(iter(self._trained))].dtype == np.float64
        dtype = torch.float64 if double else torch.float32  # a check of the gradient computes in double precision
        if dtype != self._dtype:
            self.module.to(dtype)
            self._dtype = dtype
        moved = [
            (one, parameters[name])
            for name, one in self._trained.items()
            if one.data_ptr() != parameters[name].ctypes.data
        ]
        if moved:
            with warnings.catch_warnings():  # of arrays that are read-only: nothing here writes into parameters
                warnings.simplefilter("ignore")
                for one, array in moved:
                    one.data = torch.from_numpy(array)

    def _hand_over(self, name: str, parameter: torch.Tensor) -> None:
        """Hand over the gradient that autograd has just accumulated, in a step of a run."""
        if self._gradients is None:
            return
        if name not in self._left:
            raise UserError(
                f"dbmpi.torch: the gradient of {name} is accumulated twice in a step, which checkpoint() does with "
                "use_reentrant=True; give it use_reentrant=False, and call backward() nowhere yourself"
            )
        del self._left[name]
        self._gradients.ready(name, _gradient(parameter))
        parameter.grad = None


def _gradient(parameter: torch.Tensor) -> np.ndarray:
    """Return the gradient of a parameter, zeros where it has none."""
    gradient = torch.zeros(()).expand(parameter.shape) if parameter.grad is None else parameter.grad.detach()
    array: np.ndarray = gradient.to_dense().numpy()
    return array
