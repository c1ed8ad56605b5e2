"""From a prompt to a trajectory.

`loop` takes the turns of one episode: render, generate, `formats` reads the calls that the model
wrote, `calls` has the `tools` answer them, `truncation` cuts what they say. `states` are what tools
keep for an episode. `turns` are those that the engine makes for many episodes at once. `rollout`
keeps these and the engine busy.
"""
