"""`rollout.name=vllm`: vLLM in the training processes, where it is installed.

`start` makes its engine beside a trainer, `engine` is the whole as a `RolloutEngine`.
"""
