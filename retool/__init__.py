"""retool: post-training of tool-using language models on the GPUs you have."""

__version__ = "0.1.0"
