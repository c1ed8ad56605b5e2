"""Files into rows, rows into conversations, all of it text that can't forge structure."""
