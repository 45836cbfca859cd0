"""Decoders that run a whole model on every device: plain, speculative, prompt lookup."""
