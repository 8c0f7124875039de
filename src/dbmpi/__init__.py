"""DistBelief on MPI: Downpour SGD and Sandblaster over a sharded parameter server."""

__version__ = "0.1.0"
