"""Downpour as an optimizer of PyTorch: a step pushes gradients to the shards and fetches parameters."""

from __future__ import annotations

import atexit
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dbmpi.errors import UserError
from dbmpi.loops.parameter_server import ParameterServer
from dbmpi.loops.service import Service
from dbmpi.mpi.world import aborting, everybody
from dbmpi.torch import process
from dbmpi.torch.apart import check_apart
from dbmpi.torch.gradients import Gradient

if TYPE_CHECKING:
    from mpi4py import MPI

    from dbmpi.config import ServerSection
    from dbmpi.paramserver.rules import Rule

_NAMES = ("params", "param_names")


class Downpour(torch.optim.Optimizer):  # type: ignore[misc]
    """An optimizer whose :meth:`step` pushes gradients to shards, and fetches the parameters that they have updated.

    All workers make one of a module of the same shapes (collective), after ``dbmpi.serve``; one process needs neither
    that nor a launcher.  The parameters of the first worker are those that training starts from.

    Fetches write into the module's parameters, and a gradient is copied once, to where shards read it.  With `n_push`
    and `n_fetch` of 1 it is copied as soon as autograd has computed it, and the parameter's ``grad`` is then that
    memory: it may be changed before :meth:`step`, e.g. clipped, and the next gradient will be in the same place.  So
    clone gradients that you keep, and keep none after :meth:`close`, which frees the memory.  Numbers that are not
    finite are looked for when a gradient is copied, and again if it was changed since, unless that was done through
    ``grad.data`` or ``grad.numpy()``.

    Frozen parameters, those that require no gradient when the optimizer is made, and buffers such as the statistics of
    batch normalisation stay on each worker: they are neither pushed nor fetched.  A parameter that is used in several
    places counts once.  One without a gradient in some step is pushed zeros, which ``sgd`` and ``adagrad`` leave as it
    is.

    PyTorch gets as many threads as dbmpi's own kernels, and keeps memory that it has freed for the next step.

    Parameters
    ----------
    params : iterable
        ``module.parameters()``, or ``module.named_parameters()`` for names in messages.  All on the CPU and of one
        dtype, float32 or float64.
    rule : str or rule
        How shards apply a gradient, as in :class:`dbmpi.ParameterServer`.
    n_push : int
        Push the sum of the gradients of this many steps.
    n_fetch : int
        Fetch parameters every this many steps; they stay as they are in between.
    comm : MPI.Intracomm, optional
        The ranks to use without ``dbmpi.serve``; by default all that were started.
    colocate : bool
        Put the shards on the workers' ranks, without ``dbmpi.serve``: see :class:`dbmpi.ParameterServer`.
    shards : int
        Number of shards with `colocate`.
    server : ServerSection, optional
        How gradients and parameters travel.  With ``ServerSection(fetch="shared")``, on one host, the module's
        parameters are the shards' own memory until :meth:`close`, so that nothing is copied.
    clip_norm : float
        What is pushed has at most this norm, over all parameters together; 0 for any.
    resume : str or Path, optional
        A checkpoint that :meth:`save` has written, to go on from.
    **settings
        Of a rule by name, e.g. ``learning_rate=0.1``, and of a schedule, as in :class:`dbmpi.ParameterServer`.

    Attributes
    ----------
    worker, workers : int
        Number of this worker, from 0, and how many there are: for its part of the data.

    Raises
    ------
    UserError
        On all ranks, for parameters that cannot be trained, other mistakes in the arguments, or if workers were given
        different ones.

    Examples
    --------
    >>> import torch
    >>> import dbmpi.torch
    >>> module = torch.nn.Linear(2, 1)
    >>> optimizer = dbmpi.torch.Downpour(module.parameters(), rule="adagrad", learning_rate=0.1)
    >>> loss = module(torch.ones(4, 2)).square().mean()
    >>> loss.backward()
    >>> optimizer.step()
    >>> optimizer.close()
    """

    def __init__(
        self,
        params: Iterable[Any],
        rule: str | Rule = "adagrad",
        *,
        n_push: int = 1,
        n_fetch: int = 1,
        comm: MPI.Intracomm | None = None,
        colocate: bool = False,
        shards: int = 1,
        server: ServerSection | None = None,
        clip_norm: float = 0.0,
        resume: str | Path | None = None,
        **settings: Any,
    ) -> None:
        self._server: ParameterServer | None = None
        super().__init__(params, {})
        for name, number in (("n_push", n_push), ("n_fetch", n_fetch)):
            if not isinstance(number, int | np.integer) or number < 1:
                raise UserError(f"Downpour: {name} = {number!r}: expected a whole number of at least 1")
        if server is not None and server.fetch == "shared" and n_fetch > 1:
            raise UserError(
                f"Downpour: n_fetch = {n_fetch} needs parameters that stay as they are in between: set server.fetch = "
                "'copied', or n_fetch = 1"
            )
        if Service.current is None and not colocate and (everybody() if comm is None else comm).size > 1:
            raise UserError(
                "Downpour: there are no shards: begin the program with `if dbmpi.serve(shards=1): return`, or give "
                "colocate=True"
            )
        self._n_push, self._n_fetch, self._steps, self._samples = n_push, n_fetch, 0, 0
        self._trained = _trained(self.param_groups)
        process.limit_threads()
        arrays = {name: parameter.detach().numpy() for name, parameter in self._trained.items()}
        settings |= {"shards": shards, "colocate": colocate, "server": server, "clip_norm": clip_norm, "resume": resume}
        self._server = ParameterServer(comm, arrays, rule, **settings)
        hook = n_push == n_fetch == 1  # a push has then been applied when a step is done
        memories = self._server.gradients
        self._gradients = [Gradient(each, memories[name], hook=hook) for name, each in self._trained.items()]
        self._own = {name: self._trained[name].data for name in self._server.parameters}
        self._addresses = {name: parameter.data_ptr() for name, parameter in self._trained.items()}
        self._let_be({name: _shown(array) for name, array in self._server.parameters.items()})
        self._at_exit = atexit.register(aborting(self.close))  # before that of the server
        assert self._server.worker is not None
        self.worker, self.workers = self._server.worker, self._server.workers

    def step(self, closure: Callable[[], Any] | None = None, *, samples: int = 0) -> Any:
        """Push the gradients that the parameters have, and fetch parameters: each when it is time to.

        Parameters
        ----------
        closure : callable, optional
            Computes the loss and its gradients first.
        samples : int
            How many the gradients are of, for a schedule of the learning rate; needed only then.

        Returns
        -------
        The loss of the closure, or None.

        Raises
        ------
        UserError
            If a gradient is not finite, or a parameter was replaced by another tensor.
        """
        assert self._server is not None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for name, parameter in self._trained.items():
            if parameter.data_ptr() != self._addresses[name]:
                raise UserError(
                    f"Downpour: the memory of {name} was replaced, e.g. by module.to(...); make the optimizer after "
                    "that"
                )
        more = self._steps % self._n_push > 0
        if not more:
            self._server.wait()
        finite = [gradient.put(add=more) for gradient in self._gradients]
        self._steps, self._samples = self._steps + 1, self._samples + samples
        if self._steps % self._n_push == 0:
            pushed, self._samples = self._samples, 0  # also where the gradient is refused
            self._server.push(samples=pushed, finite=not all(finite))
        if self._steps % self._n_fetch == 0:
            self._server.fetch()
        return loss

    @property
    def version(self) -> int:
        """Pushes of all workers that the shards had applied when this one last fetched."""
        assert self._server is not None
        return self._server.version

    def save(self, path: str | Path) -> None:
        """Write a checkpoint of the trained parameters and the rule's state, to resume from: one worker does this.

        It contains everything that this worker has pushed.  Frozen parameters and buffers are not in it.

        Parameters
        ----------
        path : str or Path
            Of the file: see :meth:`dbmpi.ParameterServer.save`.
        """
        assert self._server is not None
        self._server.save(path)

    def close(self) -> None:
        """Wait for all workers, and fetch the final parameters, the same on all of them (collective).

        At the end of the program this happens by itself; a second call does nothing.
        """
        assert self._server is not None
        atexit.unregister(self._at_exit)
        for gradient in self._gradients:
            gradient.release()
        self._server.close()
        self._let_be(self._own)
        self._own = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take a group of parameters; only when the optimizer is made.

        Parameters
        ----------
        param_group
            As for PyTorch's optimizers, without settings of its own.

        Raises
        ------
        UserError
            Later, or if the group has settings.
        """
        if self._server is not None:
            raise UserError("Downpour: parameters cannot be added later: make another Downpour for them")
        own = [key for key in param_group if key not in _NAMES]
        if own:
            raise UserError(
                f"Downpour: a group of parameters has {', '.join(own)}: all are updated by one rule; make a Downpour "
                "for each group"
            )
        super().add_param_group(param_group)

    def _let_be(self, tensors: dict[str, torch.Tensor]) -> None:
        """Give parameters, by name, other memory."""
        for name, tensor in tensors.items():
            self._trained[name].data = tensor
            self._addresses[name] = tensor.data_ptr()


def _shown(array: np.ndarray) -> torch.Tensor:
    """Return a tensor in the memory of an array, which may be read-only: nothing here writes into it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(array)


def _trained(groups: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return the parameters that are trained, by name."""
    found: dict[str, torch.Tensor] = {}
    parameters = [parameter for group in groups for parameter in group["params"]]
    width = len(str(len(parameters)))
    names = [name for group in groups for name in group.get("param_names", ())]
    if not names:
        names = [f"parameter {number:0{width}}" for number in range(len(parameters))]
    for name, parameter in zip(names, parameters, strict=True):
        if not parameter.requires_grad:
            continue
        if parameter.device.type != "cpu":
            raise UserError(
                f"Downpour: {name} is on the device {parameter.device}: expected the CPU; use module.to('cpu')"
            )
        if parameter.dtype not in (torch.float32, torch.float64) or parameter.layout != torch.strided:
            what = parameter.dtype if parameter.layout == torch.strided else parameter.layout
            raise UserError(f"Downpour: {name} is {what}: expected dense parameters of float32 or float64")
        found[name] = parameter
    check_apart(found, "Downpour")
    return found
