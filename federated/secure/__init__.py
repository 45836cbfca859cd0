"""Secure aggregation: a server learns the sum of its clients' words, and none of them."""
