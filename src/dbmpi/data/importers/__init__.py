"""Importers: other formats to data files, in blocks, so that memory stays bounded whatever the size."""
