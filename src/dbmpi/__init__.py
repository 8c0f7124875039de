"""DistBelief on MPI: Downpour SGD and Sandblaster over a sharded parameter server.

The description of a run and its start are here: ``dbmpi.load(path)``, ``dbmpi.Run(...)``, ``dbmpi.train(run)``; and
the batch methods for a function of one's own: ``dbmpi.minimize(objective, x)``.
They are loaded when they are first used, so that importing dbmpi starts no MPI and takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dbmpi.config import Run, load
    from dbmpi.errors import RunFailed, UserError
    from dbmpi.optim.minimize import Minimum, minimize
    from dbmpi.result import Result
    from dbmpi.train import train

__version__ = "0.1.0"
__all__ = ["Minimum", "Result", "Run", "RunFailed", "UserError", "__version__", "load", "minimize", "train"]

_HOMES = {
    "Run": "dbmpi.config",
    "load": "dbmpi.config",
    "RunFailed": "dbmpi.errors",
    "UserError": "dbmpi.errors",
    "Minimum": "dbmpi.optim.minimize",
    "minimize": "dbmpi.optim.minimize",
    "Result": "dbmpi.result",
    "train": "dbmpi.train",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its home on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dbmpi' has no attribute {name!r}")
    home = _HOMES[name]
    if home in ("dbmpi.train", "dbmpi.optim.minimize"):  # which load MPI and NumPy, with no command to prepare them
        import_module("dbmpi.runtime.installation").prepare()
        import_module("dbmpi.runtime.environment").prepare()
    # It stays here under its name: the import has just made `train` the module.
    globals()[name] = getattr(import_module(home), name)
    return globals()[name]
