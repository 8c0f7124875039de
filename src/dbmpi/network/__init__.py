"""Layers, losses, initialisation; knows nothing of ranks."""
