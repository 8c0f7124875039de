"""Cutting one model over several ranks: boxes, placement, exchange, replica."""
