"""Scripts for HPC code: `python -m jaxfm.launch.hpc <command> ...`.

advise: which loops of files can run in parallel, with which OpenMP directive, shown by what.
check: whether the OpenMP directives that files have are free of data races.
"""
