"""Gradients of PyTorch in the memory that they are pushed from: copied once, as soon as autograd has completed them."""

from __future__ import annotations

import numpy as np
import torch

from dbmpi.kernels import updates
from dbmpi.kernels.checks import copy_finite


class Gradient:
    """The gradient of one parameter.

    With a `hook`, autograd copies it while those of the layers below are still to be computed.  From then on the
    parameter's ``grad`` is the memory that is pushed from: what is done to it there, such as clipping, needs no copy.
    It is the same memory in every step.  A gradient that is to be differentiated itself is left to the user, and copied
    when it is pushed.

    Parameters
    ----------
    parameter
        Of PyTorch.
    memory
        Where its gradient is pushed from, contiguous and of its shape.
    hook
        Whether the memory may be written at any time between two steps.
    """

    def __init__(self, parameter: torch.Tensor, memory: np.ndarray, *, hook: bool) -> None:
        self._parameter, self._flat = parameter, memory.reshape(-1)
        self._memory, self._shown = memory, torch.from_numpy(memory)
        self._finite = -1
        """PyTorch's count of changes when all elements were known to be finite; -1: they may not be.

        It does not count those through ``grad.data`` and ``grad.numpy()``.
        """
        self._hook = parameter.register_post_accumulate_grad_hook(self._complete) if hook else None

    def put(self, *, add: bool = False) -> bool:
        """Write the parameter's gradient into the memory, where it is not there yet.

        Parameters
        ----------
        add
            Add it to what is there.

        Returns
        -------
        bool
            Whether all elements are known to be finite.
        """
        gradient = self._parameter.grad
        if add:
            if gradient is not None:
                updates.add(self._flat, np.ascontiguousarray(_array(gradient)).reshape(-1))
            return False
        if gradient is None:
            self._memory.fill(0)
            return True
        if gradient is not self._shown:
            self._copy(gradient)
        return bool(self._shown._version == self._finite)

    def release(self) -> None:
        """Leave the memory to others; the parameter's gradient is gone if it was there."""
        if self._hook is not None:
            self._hook.remove()
        if self._parameter.grad is self._shown:
            self._parameter.grad = None

    def _complete(self, parameter: torch.Tensor) -> None:
        """Take what autograd has computed, or added to the memory."""
        gradient = parameter.grad
        if gradient is not self._shown and gradient.layout == torch.strided and not gradient.requires_grad:
            self._copy(gradient)
            parameter.grad = self._shown

    def _copy(self, gradient: torch.Tensor) -> None:
        array = _array(gradient)
        if array.flags.carray:  # for others a kernel would have to be compiled
            finite = copy_finite(self._flat, array.reshape(-1))
        else:
            np.copyto(self._memory, array)
            finite = False
        self._finite = self._shown._version if finite else -1


def _array(gradient: torch.Tensor) -> np.ndarray:
    """Return a gradient as an array."""
    dense = gradient.detach().to_dense() if gradient.layout != torch.strided else gradient.detach()
    array: np.ndarray = dense.numpy()
    return array
