"""Checks before a GPU does any work: the request against the machine, the model and the memory; and
the plan.
"""
