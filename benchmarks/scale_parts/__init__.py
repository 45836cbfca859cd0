"""Parts of the benchmarks of scale: a round program, real processes on cores of their own, saves."""
