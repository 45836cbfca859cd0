"""Drafters: a model, the model's own first layers, the text itself, one after another, a script."""
