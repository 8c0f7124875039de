"""Network of dbmpi."""
