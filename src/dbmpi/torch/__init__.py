"""PyTorch: modules as objectives of a run, and Downpour as an optimizer for a training loop of one's own.

It needs the extra ``dbmpi[torch]``.
"""

import os

from dbmpi.mpi.load import load

# Autograd allocates gradients anew in every step, and new pages take longer to fill than to compute with.  Huge pages,
# which NumPy requests for large arrays, are fewer.  PyTorch reads this when it first allocates memory.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
try:
    import torch  # noqa: F401 - to say what is missing
except ImportError as error:
    raise ImportError("dbmpi.torch needs PyTorch: pip install 'dbmpi[torch]'") from error
load()

from dbmpi.torch.module import ModuleObjective, objective  # noqa: E402
from dbmpi.torch.optimizer import Downpour  # noqa: E402
from dbmpi.torch.trained import state_dict  # noqa: E402

__all__ = ["Downpour", "ModuleObjective", "objective", "state_dict"]
