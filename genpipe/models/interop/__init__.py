"""Weights of other libraries, as functions on state dicts: names and layouts changed, nothing read or written."""
