"""Loops of the user's own, instead of the run's: the names that they may import.

`protocol` is what it is given and what it returns. `play` has it play a trajectory, on one of
`threads`. What it asks for comes by way of `handles` to the `recorder`, which knows by `contexts`
what the model was given and what it sampled.
"""

from retool.rl.agent.loops.protocol import Ending, ToolAnswer, TrajectoryOver, Turn

__all__ = ["Ending", "ToolAnswer", "TrajectoryOver", "Turn"]
