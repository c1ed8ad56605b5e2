"""Elementwise work around a block's products, as operators of ours: one pass over memory each."""
