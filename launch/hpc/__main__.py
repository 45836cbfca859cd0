"""Runs one of the commands of `jaxfm.launch.hpc.commands`."""

from jaxfm.launch.hpc.commands import main

if __name__ == "__main__":
    main()
