"""`rollout.name=hf`: transformers' continuous batching in the training processes, for models that run
as transformers' module.

`module` is the model that samples, over the trainer's weights; `batching` runs its batches, `engine`
is the whole as a `RolloutEngine`.
"""
