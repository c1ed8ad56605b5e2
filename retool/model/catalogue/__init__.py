"""Which model families there are, and what was measured for each."""
