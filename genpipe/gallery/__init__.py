"""A page on this machine to draw with a system, and to look at what its pipeline has drawn."""
