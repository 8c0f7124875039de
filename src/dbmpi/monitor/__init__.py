"""Monitor of dbmpi."""
