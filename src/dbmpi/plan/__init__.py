"""A cost model of Downpour: how fast a network will learn on a cluster, before there is one; without MPI."""
