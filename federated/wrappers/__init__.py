"""Wrappers around any algorithm: compression, quorums, secure sums, robust rules."""
