"""The parts of `federated_table.py`: its works, its rows, and what slices of models are worth."""
