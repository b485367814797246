"""Conversion of Hugging Face and GGUF checkpoints to stacked Flax parameters, and back."""
