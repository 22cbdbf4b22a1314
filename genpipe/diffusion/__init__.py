"""Continuous-time diffusion as functions on tensors: x_t = alpha x0 + sigma noise, t from 0 to 1 (noise)."""
