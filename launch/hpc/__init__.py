"""Scripts for HPC code: `python -m jaxfm.launch.hpc <command> ...`.

advise: which loops of files can run in parallel, with which OpenMP directive, shown by what.
check: whether the OpenMP directives that files have are free of data races.
train: a model that answers a task, such as whether loops race, from generated and proved programs.
evaluate: how well it does on programs that it has not seen, beside trivial baselines.
"""
