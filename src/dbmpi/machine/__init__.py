"""The node, before NumPy and MPI are loaded: threads, BLAS, caches, launchers.  The standard library alone."""
