"""What the engine computes besides the decoder's layers: paged attention over the KV cache, placing
keys and values in it, sampling. A `*_triton` file has the GPU's kernels, the file it is named after
chooses them.
"""
