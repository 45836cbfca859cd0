"""The parts of `foundation_table.py`: its works, what of a model is trained, and its arms."""
