"""The parts of `accelerator.py`: one module a part, and the frame that they share."""
