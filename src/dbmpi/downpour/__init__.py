"""Downpour SGD (section 4.1 of the paper)."""
