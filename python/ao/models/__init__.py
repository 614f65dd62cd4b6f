"""Models: loading by structure, and LoRA adapters."""
