"""A small federated run in a process of its own: saved and resumed, on one or several devices.

    python federated_worker.py OUT [--folder F] [--calls N] [--devices D]
        [--coordinator HOST:PORT --process P [--home]]

Writes the final server state, and without a folder how good it is, to OUT (npz). Tests start it
with `launch` and read it with `finish`.
"""

import argparse
import os
import subprocess
import sys

CALLS = 10  # of two rounds each; saved after each call
TIMEOUT_S = 240


def launch(out, *options, **environment) -> subprocess.Popen:
    """Starts a run that writes `out`; options as on the command line."""
    return subprocess.Popen(
        [sys.executable, __file__, str(out), *map(str, options)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    """What a run printed; fails with it where the run failed, and ends it where it hangs."""
    try:
        printed, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        printed, _ = process.communicate()
        raise AssertionError(f"no end after {TIMEOUT_S} s:\n{printed[-4000:]}") from None
    assert process.returncode == 0, f"ended with {process.returncode}:\n{printed[-4000:]}"
    return printed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--folder")
    parser.add_argument("--calls", type=int, default=CALLS)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--coordinator")
    parser.add_argument("--process", type=int)
    parser.add_argument("--home", action="store_true")  # each process has its own clients' rows
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = os.environ.get("XLA_FLAGS", "")  # the last of a flag counts
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={args.devices}"

    import jax

    if args.coordinator:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(args.coordinator, 2, args.process, initialization_timeout=60)

    import numpy as np
    import optax

    from jaxfm.checkpoint import Checkpointer
    from jaxfm.data.federation import federate
    from jaxfm.federated.accounting.metrics import client_metrics, global_metrics
    from jaxfm.federated.accounting.resources import profiles
    from jaxfm.federated.algorithms.hetero_fl import hetero_fl
    from jaxfm.federated.local import Local
    from jaxfm.federated.population import Population
    from jaxfm.federated.rounds import compile_rounds
    from jaxfm.models.families.cnn import mlp
    from jaxfm.subnet import Subnet
    from jaxfm.tasks import classification

    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_disable_most_optimizations", True)

    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, 30).astype(np.int32)
    x = (rng.normal(size=(30, 6)) + label[:, None]).astype(np.float32)
    data = federate({"x": x, "label": label}, np.split(np.arange(30), [4, 5, 11, 18, 21, 29]))
    model, task = mlp((6, 8, 3)), classification(3, inputs="x")
    tiers = [Subnet({}), Subnet({"hidden1": np.arange(4)})]
    local, server = Local(optax.sgd(0.1), 4, 2), optax.adam(0.02)
    algorithm = hetero_fl(model, task, local, tiers, optimizer=server)
    bucket = np.arange(7) % 2
    people = Population(data, profiles(7, max_steps=np.array([1, 9, 2, 9, 3, 9, 9])), bucket)
    if args.home:
        home = np.arange(7) % 2
        mine = np.concatenate([data.rows_of(i) for i in range(7) if home[i] == args.process])
        rows = {"x": np.full_like(x, np.nan), "label": np.full_like(label, -1)}
        for name, leaf in rows.items():
            leaf[mine] = data.examples[name][mine]
        people = people._replace(federation=data._replace(examples=rows), home=home)
    engine = compile_rounds(algorithm, people, cohort_size=5, num_rounds=2, drop_rate=0.1)
    state = engine.init(model.init(jax.random.key(1)), jax.random.key(2))
    print(
        "rounds on", len(jax.devices()), "devices of", jax.process_count(), "processes", flush=True
    )

    if args.folder:
        with Checkpointer(args.folder) as checkpoints:
            if checkpoints.latest_step() is not None:
                _, state = checkpoints.restore(like=state)
                print("resumed at round", int(state.round), flush=True)
            while int(state.round) < 2 * args.calls:
                state, _ = engine.run(state)
                checkpoints.save(int(state.round), state)
                print("saved round", int(state.round), flush=True)
    else:
        for _ in range(args.calls):
            state, _ = engine.run(state)

    result = jax.tree_util.tree_leaves_with_path(state.server)
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in result}
    arrays["key"], arrays["round"] = jax.random.key_data(state.key), np.asarray(state.round)
    if not args.folder:
        own = client_metrics(algorithm, bucket, task, batch_size=4)(state, data)
        overall = global_metrics(algorithm, state, task, data.examples, batch_size=8)
        arrays |= {f"own {name}": column for name, column in own.items()}
        arrays |= {f"overall {name}": np.asarray(value) for name, value in overall.items()}
    if not args.process:
        np.savez(args.out, **arrays)


if __name__ == "__main__":
    main()
