"""A prompt into a trajectory: the loop of turns, the calls that a model writes, the tools that
answer them.
"""
