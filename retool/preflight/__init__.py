"""Before a GPU second: what is asked for, checked against the machine, the model and the memory,
and told as a plan.
"""
