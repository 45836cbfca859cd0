"""Real processes on loopback, joined by `jax.distributed`: started, watched and ended by tests."""

import os
import socket
import subprocess
import sys
import threading

TIMEOUT_S = 600  # of a machine that others keep busy


class Process:
    """One process of a job; `said` grows while it runs."""

    def __init__(self, words: list[str], **environment: str):
        self.said = ""
        self._process = subprocess.Popen(
            [sys.executable, "-m", *words],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.signal = self._process.send_signal
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._changed:
                self.said += line
                self._changed.notify_all()

    def wait_for(self, words: str) -> None:
        """Waits until it has said something."""
        with self._changed:
            there = self._changed.wait_for(
                lambda: words in self.said or not self._reader.is_alive(), TIMEOUT_S
            )
        assert there and words in self.said, f"it never said {words!r}:\n{self.said[-4000:]}"

    def end(self) -> int:
        """Waits for its end; the exit status."""
        try:
            self._process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end after {TIMEOUT_S} s:\n{self.said[-4000:]}") from None
        finally:
            self.kill()
        return self._process.returncode

    def kill(self) -> None:
        """Ends it, if it still runs."""
        self._process.kill()
        self._process.wait()
        self._reader.join()


def start(count: int, script: str, *flags: object, **environment: str) -> list[Process]:
    """Starts `python -m jaxfm.launch.SCRIPT` in `count` processes of one CPU device each."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    words = [f"jaxfm.launch.{script}", *map(str, flags)]
    one = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=1"
    environment = {"XLA_FLAGS": one} | environment
    job = [[f"--coordinator=localhost:{port}", f"--num_processes={count}"]] * (count > 1) or [[]]
    return [
        Process([*words, *job[0], *[f"--process_id={p}"] * (count > 1)], **environment)
        for p in range(count)
    ]
