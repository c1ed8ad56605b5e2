"""What of a data set is trained, counted and shown before it is."""
