"""A pipe of two processes in network namespaces of their own, over a link of limited rate.

    python benchmarks/pipe_namespaces.py [--quick]

Linux, as root. Each stage is a process of `jax.distributed` in a namespace with one end of a
virtual cable, whose rate a token bucket limits; both decode the same text plainly pipelined and
with continuous speculation (a draft of the target's own first layer), and the tokens are those of
plain decoding. The last line is one JSON object: tokens a second by rate in Mbit/s, the bytes that
crossed the cable a token, and whether all tokens were the same. Where namespaces are not allowed it
says so and ends with {"allowed": false}.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import socket
import subprocess
import sys

SPACES = ("jaxfm-a", "jaxfm-b")
CABLES = ("jaxfm-va", "jaxfm-vb")
ADDRESSES = ("10.203.0.1", "10.203.0.2")

STAGE = """
import json, os, sys, time
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), initialization_timeout=60)
from jaxfm.parallel import generate, make_mesh
from jaxfm.parallel.drafters.model import early_exit_drafter
from jaxfm.parallel.pipe.pipeinfer import pipeinfer, pipelined
from jaxfm.testing import random_variables, tiny_decoder
layers, embed, new = map(int, sys.argv[3:6])
model = tiny_decoder(num_layers=layers, embed_dim=embed, mlp_dim=2 * embed, max_len=512)
variables = random_variables(model)
mesh = make_mesh(stage=2)
made = {
    "pipelined": pipelined(model, variables, mesh=mesh),
    "continuous": pipeinfer(model, variables, early_exit_drafter(model, variables, 1), mesh=mesh),
}
out = {}
for name, decoder in made.items():
    for _ in range(2):  # the first call compiles
        began = time.perf_counter()
        got = generate(decoder, [[1, 2, 3, 4, 5]], max_new_tokens=new)
        took = time.perf_counter() - began
    out[name] = {"tokens_per_s": new / took, "ticks": int(got.counters.ticks),
                 "tokens": got.tokens[0].tolist()}
print("RESULT", json.dumps(out))
"""

PLAIN = """
import json, sys
from jaxfm.parallel import generate, plain
from jaxfm.testing import random_variables, tiny_decoder
layers, embed, new = map(int, sys.argv[1:4])
model = tiny_decoder(num_layers=layers, embed_dim=embed, mlp_dim=2 * embed, max_len=512)
got = generate(plain(model, random_variables(model)), [[1, 2, 3, 4, 5]], max_new_tokens=new)
print("RESULT", json.dumps(got.tokens[0].tolist()))
"""


def command(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)


def build(rate_mbit: int) -> None:
    """Two namespaces and a cable between them."""
    for space in SPACES:
        command("ip", "netns", "add", space)
    command("ip", "link", "add", CABLES[0], "netns", SPACES[0], "type", "veth",
            "peer", "name", CABLES[1], "netns", SPACES[1])  # fmt: skip
    for space, cable, address in zip(SPACES, CABLES, ADDRESSES):
        command("ip", "-n", space, "addr", "add", f"{address}/24", "dev", cable)
        command("ip", "-n", space, "link", "set", cable, "up")
        command("ip", "-n", space, "link", "set", "lo", "up")
        command("ip", "netns", "exec", space, "tc", "qdisc", "add", "dev", cable, "root", "tbf",
                "rate", f"{rate_mbit}mbit", "burst", "64kb", "latency", "500ms")  # fmt: skip
        # Processes find their own address by the machine's name.
        folder = pathlib.Path("/etc/netns") / space
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n")


def remove() -> None:
    """Takes away the namespaces that an earlier run may have left."""
    for space in SPACES:
        subprocess.run(["ip", "netns", "del", space], capture_output=True)
        folder = pathlib.Path("/etc/netns") / space
        if folder.exists():
            (folder / "hosts").unlink(missing_ok=True)
            folder.rmdir()


def crossed(space: str, cable: str) -> int:
    """Bytes that one end has sent."""
    printed = subprocess.run(
        ["ip", "-n", space, "-s", "-j", "link", "show", cable], capture_output=True, text=True
    ).stdout
    return int(json.loads(printed)[0]["stats64"]["tx"]["bytes"])


def result_of(printed: str):
    """The figures in what the last stage printed; RuntimeError where there are none."""
    lines = [line for line in printed.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise RuntimeError(f"A process ended without a result:\n{printed[-3000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def measure(rate_mbit: int, sizes: list[str]) -> dict:
    """Figures of one text over links of a rate, with what crossed them."""
    remove()
    build(rate_mbit)
    try:
        stages = [
            subprocess.Popen(
                ["ip", "netns", "exec", space, sys.executable, "-c", STAGE,
                 f"{ADDRESSES[0]}:9731", str(i), *sizes],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ,
            )
            for i, space in enumerate(SPACES)
        ]  # fmt: skip
        try:
            printed = [stage.communicate(timeout=400)[0] for stage in stages]
        finally:
            for stage in stages:
                stage.kill()
        found = result_of(printed[0])
        found["megabytes"] = sum(map(crossed, SPACES, CABLES)) / 1e6
        return found
    finally:
        remove()


def main(quick: bool) -> dict:
    result: dict = {"name": "pipe_namespaces", "allowed": True}
    try:
        remove()
        build(100)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"No network namespaces here: {getattr(error, 'stderr', error)}")
        return result | {"allowed": False}
    finally:
        remove()
    sizes = ["4", "64", "32"] if quick else ["6", "192", "128"]
    printed = subprocess.run(
        [sys.executable, "-c", PLAIN, *sizes], capture_output=True, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    truth = result_of(printed.stdout + printed.stderr)
    same, table = True, {}
    for rate in (100,) if quick else (1000, 100, 10, 2):
        found = measure(rate, sizes)
        same &= all(found[name]["tokens"] == truth for name in ("pipelined", "continuous"))
        table[rate] = {
            name: round(found[name]["tokens_per_s"], 1) for name in ("pipelined", "continuous")
        } | {"megabytes": round(found["megabytes"], 2)}
        print(f"{rate} Mbit/s: {table[rate]}", flush=True)
    return result | {"identical": same, "tokens_per_s": table}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small model, one rate")
    print(json.dumps(main(parser.parse_args().quick)))
