"""Search strategies under one contract, and the loop that runs them."""
