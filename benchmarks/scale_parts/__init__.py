"""Parts of the benchmarks of scale: a round program, processes on cores of their own, saves."""
