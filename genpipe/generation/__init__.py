"""From text to pixels: each stage's sampling as functions, and the whole system."""
