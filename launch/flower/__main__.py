"""Runs one of the commands of `jaxfm.launch.flower.commands`."""

from jaxfm.launch.flower.commands import main

if __name__ == "__main__":
    main()
