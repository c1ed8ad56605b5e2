"""A trajectory into a score, in processes that can be killed."""
