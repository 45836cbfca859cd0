"""The parts of `privacy.py`: DP-SGD, and attacks on models and gradients."""
