"""This rank's flat shards: what they are, filling them from disk, and cutting them into rows."""
