"""Checkpoint of dbmpi."""
