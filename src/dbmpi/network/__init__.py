"""Models as layers and a loss, in one process; knows nothing of ranks."""

from dbmpi.network.network import Network

__all__ = ["Network"]
