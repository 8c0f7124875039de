"""Runs from their description, and trained networks: evaluation, prediction, profiles."""
