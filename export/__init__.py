"""Exporters: a rewritten graph in, files of one target format out."""
