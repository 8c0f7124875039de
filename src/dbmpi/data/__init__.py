"""Data of dbmpi."""
