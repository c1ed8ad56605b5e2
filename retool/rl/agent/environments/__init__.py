"""Worlds that answer the model: games, simulated users, tasks with a state.

`protocol` says what a user's class gives. `load` finds it. `world` is one trajectory's, each of its
calls within its time. `play` takes the turns: the model's, then the world's.
"""
