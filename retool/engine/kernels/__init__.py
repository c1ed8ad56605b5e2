"""What the engine computes besides the decoder's layers: paged attention, placing keys and values,
sampling.
"""
