"""Analysis: what fine-tuning changed, in numbers."""
