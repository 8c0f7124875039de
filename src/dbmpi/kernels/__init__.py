"""Kernels of dbmpi."""
