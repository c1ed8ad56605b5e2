"""`rollout.name=server`: tokens that servers sample, vLLM's, SGLang's or ours, over HTTP.

`dialects` is what each of them is told and answers, `fleet` which of them are there, `sender` the
thread that asks, `weights` how they get new ones. `engine` is the whole as a `RolloutEngine`.
"""
