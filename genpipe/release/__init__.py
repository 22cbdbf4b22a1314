"""Releases: a system with all that is needed to draw, to judge it, and to find out whether a copy is what was made."""
