"""Watching a run: its records, its progress on the terminal, its plots."""
