"""Language models for code of high-performance computing: programs, proofs, tasks."""
