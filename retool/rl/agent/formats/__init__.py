"""How models write calls of tools, a file for each format.

`table` has their names and finds a user's own; `choose` finds the one that a chat template wants.
"""
