"""Groups into a gradient: advantages, corrections, losses, and the batches that they are computed
over.
"""
