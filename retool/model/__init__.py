"""Own decoders; parameter names equal to Hugging Face's."""
