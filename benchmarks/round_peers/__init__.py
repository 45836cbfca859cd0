"""Other libraries' federated averaging on the clients and batches of `rounds.py`."""
