"""Metrics as functions on features and images, and pictures of them."""
