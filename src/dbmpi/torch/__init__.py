"""PyTorch: Downpour as an optimizer for a training loop of one's own.  It needs the extra ``dbmpi[torch]``."""

from dbmpi.mpi.load import load

try:
    import torch  # noqa: F401 - to say what is missing
except ImportError as error:
    raise ImportError("dbmpi.torch needs PyTorch: pip install 'dbmpi[torch]'") from error
load()

from dbmpi.torch.objective import ModuleObjective  # noqa: E402
from dbmpi.torch.optimizer import Downpour  # noqa: E402

__all__ = ["Downpour", "ModuleObjective"]
