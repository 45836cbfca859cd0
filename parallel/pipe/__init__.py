"""PipeInfer: a model cut by layers over a pipe of devices, which speculates without waiting."""
