"""Files that nobody vouches for: GGUF, safetensors, JSON."""
