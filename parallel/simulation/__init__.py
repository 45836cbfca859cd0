"""What a given cluster would do: a simulator, a cluster of sleeping threads, a probe of XLA."""
