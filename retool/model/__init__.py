"""Own decoders for Llama, Qwen2(.5) and Qwen3 dense; parameter names equal to Hugging Face's."""
