"""What Hugging Face's files say: the fields of a `config.json` that families read (sizes, switches,
rope, windows), and the names of weights.
"""
