"""retool: post-training of tool-using language models on the GPUs you have."""

__version__ = "0.1.0"

# What the index calls it; `import retool` all the same
__distribution__ = "retool-train"
