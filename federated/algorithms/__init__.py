"""Federated algorithms: one paper, one file. `jaxfm.federated` exports their factories."""
