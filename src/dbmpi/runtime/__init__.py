"""Runtime of dbmpi."""
