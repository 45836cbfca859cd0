"""Runs `python -m jaxfm.launch.cluster`."""

from jaxfm.launch.cluster.render import start

if __name__ == "__main__":
    start()
