"""Environments of OpenEnv (0.3): classes that are run here, and servers that are spoken to.

`source` finds one, and makes the worlds of trajectories. `worlds` has the two kinds. `interface` is
what a turn of the model means there, and what of an observation the model reads.
"""
