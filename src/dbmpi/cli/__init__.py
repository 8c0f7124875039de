"""Cli of dbmpi."""
