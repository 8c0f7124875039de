"""Checkpoints: one HDF5 file with whole, named arrays that any HDF5 tool reads (``docs/checkpoint-format.md``)."""
