"""Which families there are, and what was measured of each."""
