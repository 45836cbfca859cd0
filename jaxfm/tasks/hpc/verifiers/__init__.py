"""Tools that judge programs: a proof, race detectors, equality of results, counts.

Each module has `verify(programs) -> list[Judgement]`, and `available()`, which says in one sentence
why its tool cannot be used here, or None. What is compiled and run is run in `sandbox` alone.
"""
