"""The audit of a data set: which of its tokens would be trained, counted and shown before a run."""
