"""Models on disk and on the Hugging Face Hub.

`files`, `download`, `weight_files` and `vae_weights` are what models load with, and know none; `save` writes models
with all that they need beside them, `publish` sends them, with the card that `card` writes.
"""
