"""Everything that names MPI's machinery: start and end, waiting, failures, windows, topology."""
