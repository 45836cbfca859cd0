"""What a cluster of given stages would do: closed forms, a simulator, an emulated cluster."""
