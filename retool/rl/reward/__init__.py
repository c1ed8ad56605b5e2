"""From a trajectory to its score.

An answer gets its score in `score`, which calls the reward function and checks what it gives.
`builtin` holds the functions that are ours, `source` says which one a run asked for, and `calling`
what a function is called with. `protocol` is how judges answer. `judges` opens them: processes that
can be killed (`pool`, with `worker` inside them), or an async function in the run's own process
(`async_judge`).
"""
