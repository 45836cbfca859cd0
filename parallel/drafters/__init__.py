"""Drafters: a model or its first layers, lookup in the text, one after another, a script."""
