"""DistBelief on MPI: Downpour SGD and Sandblaster over a sharded parameter server.

The description of a run and its start are here: ``dbmpi.load(path)``, ``dbmpi.Run(...)``, ``dbmpi.train(run)``,
and in virtual time ``dbmpi.simulate(run)``;
trained networks are used by ``dbmpi.evaluate(checkpoint, data)`` and ``dbmpi.predict(checkpoint, data)``, and read by
``dbmpi.parameters(checkpoint)``; there are
the batch methods for a function of one's own: ``dbmpi.minimize(objective, x)``; and the parameter server for a loop of
one's own: ``dbmpi.ParameterServer(comm, arrays)``, ``dbmpi.serve(shards=1)``, and
``dbmpi.torch.Downpour(module.parameters())`` for PyTorch; and ``dbmpi.jax.objective(loss, parameters)`` for JAX.
They are loaded when they are first used, so that importing dbmpi starts no MPI and takes no time.  What comes before
NumPy, Numba and MPI are loaded is prepared by itself, whatever a program uses of the package (`dbmpi.machine.early`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dbmpi.machine import early

if TYPE_CHECKING:
    from dbmpi._minimize import Minimum, minimize
    from dbmpi.checkpoint.parameters import parameters
    from dbmpi.config import Run, load
    from dbmpi.errors import RunFailed, UserError
    from dbmpi.formats.export import export
    from dbmpi.loops.parameter_server import ParameterServer
    from dbmpi.loops.service import serve
    from dbmpi.result import Result
    from dbmpi.runs.prediction import evaluate, predict
    from dbmpi.runs.simulation import simulate
    from dbmpi.runs.training import train

early.watch()

__version__ = "0.1.0"
__all__ = [
    "Minimum",
    "ParameterServer",
    "Result",
    "Run",
    "RunFailed",
    "UserError",
    "__version__",
    "evaluate",
    "export",
    "load",
    "minimize",
    "parameters",
    "predict",
    "serve",
    "simulate",
    "train",
]

_HOMES = {
    "Run": "dbmpi.config",
    "load": "dbmpi.config",
    "RunFailed": "dbmpi.errors",
    "UserError": "dbmpi.errors",
    "Minimum": "dbmpi._minimize",
    "minimize": "dbmpi._minimize",
    "ParameterServer": "dbmpi.loops.parameter_server",
    "serve": "dbmpi.loops.service",
    "Result": "dbmpi.result",
    "train": "dbmpi.runs.training",
    "simulate": "dbmpi.runs.simulation",
    "export": "dbmpi.formats.export",
    "evaluate": "dbmpi.runs.prediction",
    "predict": "dbmpi.runs.prediction",
    "parameters": "dbmpi.checkpoint.parameters",
}
_EXTRAS = ("jax", "torch")
"""Modules that need software of their own, see the extras of these names."""


def __getattr__(name: str) -> Any:
    """Load a public name from its home on first use."""
    if name in _EXTRAS:
        return import_module(f"dbmpi.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'dbmpi' has no attribute {name!r}")
    home = _HOMES[name]
    if home.startswith(("dbmpi.runs.", "dbmpi.loops.", "dbmpi.formats.", "dbmpi._minimize")):
        import_module("dbmpi.mpi.load").load()
    globals()[name] = getattr(import_module(home), name)
    return globals()[name]


def __dir__() -> list[str]:
    """List the public names, also those that are not loaded yet."""
    return sorted({*__all__, *_EXTRAS, *(name for name in globals() if name.startswith("__"))})
