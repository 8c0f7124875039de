"""Optim of dbmpi."""
