"""A conversation into tokens and a mask: the renderer, and where the mask is decided."""
