"""The addresses of a model's tensors, derived from its module structure.

`tools/derive_kinds.py` writes the shipped table with it; `taia.kinds` asks it about a
model type that the table does not know. It needs torch and transformers, builds models
on the meta device (no memory, no weights) and runs no code that comes with a checkpoint.
"""
