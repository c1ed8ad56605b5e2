"""What lies on the disk: pickled shards read without running them, safetensors, which rows of a
parameter are where.
"""
