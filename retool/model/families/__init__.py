"""One file per model family: how it reads its `config.json`, its block, and Hugging Face's names."""
