"""Samples to learn from: HDF5 files, the stream of batches, and importers that make such files."""
