"""JAX: a loss of parameters in a tree as an objective.  It needs the extra ``dbmpi[jax]``."""

from dbmpi.mpi.load import load

try:
    import jax  # noqa: F401 - to say what is missing
except ImportError as error:
    raise ImportError("dbmpi.jax needs JAX: pip install 'dbmpi[jax]'") from error
load()

from dbmpi.jax.device import prepare  # noqa: E402
from dbmpi.jax.loss import LossObjective  # noqa: E402

prepare()
objective = LossObjective
__all__ = ["LossObjective", "objective"]
