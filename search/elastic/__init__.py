"""Supernets: one training, a network for every budget."""
