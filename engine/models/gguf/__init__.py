"""GGUF files become checkpoints in the Hugging Face layout, once. Loads no PyTorch."""
