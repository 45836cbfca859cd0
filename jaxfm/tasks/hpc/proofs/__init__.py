"""Proofs about programs: enumeration for given sizes, integer sets for all sizes, clauses."""
