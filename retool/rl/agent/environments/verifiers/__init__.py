"""Environments of the package `verifiers` (0.4), played in this rollout.

`house` is what a process keeps of one: verifiers' own servers, on an event loop of their own.
`world` is one trajectory in it, as an `Environment`. `seat` is the program that plays the policy's
part: all it says comes from here, through `conversation`. `rows` makes rows of verifiers' tasks.
Only `seat` imports verifiers when it is imported.
"""
