"""Data: sources of examples, partitions over clients, federations of them."""
