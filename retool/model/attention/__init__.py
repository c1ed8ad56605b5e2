"""Attention over packed sequences: one function, and the kernels that it chooses from."""
