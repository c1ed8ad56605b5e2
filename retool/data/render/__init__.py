"""A conversation into tokens and a mask, by the model's own chat template."""
