"""Boxes, layouts and what meets what: pure integers, which import nothing of dbmpi."""
