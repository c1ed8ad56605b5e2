"""Rows to packed batches: read, check, render with masks, pack, and serve in a resumable order."""
