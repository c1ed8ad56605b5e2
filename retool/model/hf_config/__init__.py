"""The fields of a Hugging Face `config.json` that the families read: sizes, switches, rope."""
