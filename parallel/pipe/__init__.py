"""PipeInfer: a model cut by layers over a pipe of devices that never waits to guess on."""
