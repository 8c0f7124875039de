"""Sandblaster (section 4.2 of the paper)."""
