"""Downpour in virtual time: real gradients and real updates of many replicas, in one process."""
