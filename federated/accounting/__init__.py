"""What a run costs its clients, and how well it serves them."""
