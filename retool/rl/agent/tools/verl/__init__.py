"""Tools that were written for verl, as they are: `modules` stands in for what of verl they import,
`tool` is one of them as a tool that keeps a state.
"""
