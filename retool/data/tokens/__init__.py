"""Text into token ids: tokenizers, control tokens, and the one encoder."""
