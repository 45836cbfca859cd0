"""What centers gain that may not share their code: does a program race, on families never seen?

    python benchmarks/hpc_sites.py [--quick] [--arms=sites,public,wrong] [--rounds=40] [--seeds=1]

Four sites write their own dialect (`jaxfm.tasks.hpc.sites`): dense Fortran, sparse C, reductions,
tasks and regions. The encoder is the same in every arm, and every arm trains on as many batches:

- local: each site by itself;
- fed_avg, scaffold: one model of all sites; fed_per: one with the last layers of each site's own;
- central: all code in one place, as many steps as all sites take together: the upper bound.

From a model of public C (three families, as many steps as a site takes): that model alone, fed_avg
of all of it, and fed_lora, which trains rank 4 on all linear maps and the head.

Then one site labels wrongly (inverted), and fed_avg stands beside its robust forms: the median and
the geometric median of the sites' updates, and fl_trust with a few rows of the server.

A figure is the mean over sites of the accuracy on families that the site never writes, labels
proved. Columns: that, and accuracy on all families. The last line is one JSON object;
federated_minus_local is fed_avg less local, in points.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfm.adapters import lora
from jaxfm.data.dealing import Data
from jaxfm.data.federation import federate
from jaxfm.federated import Algorithm, Local, prepare, train
from jaxfm.federated.foundation.central import TrainState, train_steps
from jaxfm.federated.wrappers import robust_rules
from jaxfm.federated.wrappers.robust import with_robust
from jaxfm.launch.hpc import training
from jaxfm.model import Model
from jaxfm.parallel.mesh import make_mesh
from jaxfm.tasks.hpc import encoding
from jaxfm.tasks.hpc.reader import Reading, forward, probabilities
from jaxfm.tasks.hpc.sites import DIALECTS, Dialect, Example, sites
from jaxfm.tasks.hpc.tokenizers import LexerTokenizer

TASK = encoding.classify(2)
WRONG: dict = {"tasks and regions": "inverted"}
PUBLIC = {"public": Dialect(("line", "reduction", "critical"), "c", 1.0)}
KEY = jax.random.key(0)


class Work(NamedTuple):
    """What every arm trains on and is scored on.

    Attributes:
        train: Arrays of each site.
        unseen: By site, arrays of the families that it never writes.
        everything: Arrays of all test rows.
        root: A few rows of the server, with proved labels.
    """

    train: list[dict[str, np.ndarray]]
    unseen: list[dict[str, np.ndarray]]
    everything: dict[str, np.ndarray]
    root: dict[str, np.ndarray]


def arrays(rows: Sequence[Example], reading: Reading) -> dict[str, np.ndarray]:
    """Inputs and labels of rows."""
    found = reading.arrays([row.source for row in rows])
    del found["start"]
    return found | {"label": np.array([row.label for row in rows], np.int32)}


def work(args: argparse.Namespace, seed: int, reading: Reading, labels=None) -> Work:
    """Draws the sites."""
    drawn = sites(seed, args.items, args.test, labels=labels)
    tests = [(row.family, row) for rows in drawn.test.values() for row in rows]
    everything = arrays([row for _, row in tests], reading)
    unseen = []
    for dialect in DIALECTS.values():
        foreign = np.array([family not in dialect.families for family, _ in tests])
        unseen.append({name: leaf[foreign] for name, leaf in everything.items()})
    root = [row._replace(label=row.racy) for rows in drawn.train.values() for row in rows[:16]]
    return Work(
        [arrays(rows, reading) for rows in drawn.train.values()], unseen, everything,
        arrays(root, reading),
    )  # fmt: skip


def score(model: Model, variables, made: Work, own: Sequence | None = None) -> tuple[float, float]:
    """Accuracy on unseen families, mean over sites, and on all families.

    Args:
        model: The network.
        variables: Of one model for all, or None.
        made: What is scored on.
        own: The variables of each site's model, in place of one for all.
    """
    each = own if own is not None else [variables] * len(made.unseen)
    said = lambda v, rows: probabilities(forward(model, v, rows)) > 0.5
    accuracy = lambda v, rows: float((said(v, rows) == rows["label"]).mean())
    foreign = [accuracy(v, rows) for v, rows in zip(each, made.unseen)]
    alike = each if own is not None else [variables]
    return float(np.mean(foreign)), float(np.mean([accuracy(v, made.everything) for v in alike]))


def repeated(rows: dict[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    """Rows again and again, so that all sites share one compiled program."""
    index = np.resize(np.arange(len(rows["label"])), number)
    return {name: leaf[index] for name, leaf in rows.items()}


def alone(model: Model, rows: dict, args: argparse.Namespace, steps: int, seed: int):
    """The variables of a model that has taken steps on rows of one place."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(args.rate, b2=0.98))
    variables = jax.jit(model.init)(jax.random.key(seed))
    state = TrainState(
        variables, optimizer.init(variables.params), jnp.zeros((), jnp.int32),
        jax.random.key(seed + 1),
    )  # fmt: skip
    run = train_steps(model, TASK, optimizer, args.batch, args.local_steps, make_mesh(data=1))
    for _ in range(steps // args.local_steps):
        state, _ = run(state, rows)
    return state.variables


def federated(
    name: str,
    model: Model,
    made: Work,
    args: argparse.Namespace,
    seed: int,
    wrap: Callable[[Algorithm], Algorithm] | None = None,
) -> tuple[float, float]:
    """The scores of an algorithm; where sites have models of their own, the mean of these."""
    joined = {k: np.concatenate([part[k] for part in made.train]) for k in made.train[0]}
    ends = np.cumsum([len(part["label"]) for part in made.train])
    owned = [np.arange(a, b) for a, b in zip([0, *ends[:-1]], ends)]
    foreign = {k: np.concatenate([part[k] for part in made.unseen]) for k in made.unseen[0]}
    ends = np.cumsum([len(part["label"]) for part in made.unseen])
    data = Data(
        train=federate(joined, owned),
        local_validation=None,
        local_test=federate(foreign, [np.arange(a, b) for a, b in zip([0, *ends[:-1]], ends)]),
        validation=made.root,
        test=made.everything,
        names=tuple(DIALECTS),
        task=TASK,
        tokenizer=None,
        public=None,
    )
    plain = name == "scaffold"  # its control variates are those of plain steps
    optimizer = optax.sgd(args.sgd_rate) if plain else optax.adam(args.rate, b2=0.98)
    steps = optax.chain(optax.clip_by_global_norm(1.0), optimizer)
    local = Local(steps, args.batch, 1)
    ready = prepare(
        name, model, data, local, num_rounds=args.rounds, wrap=wrap, max_steps=args.local_steps,
        seed=seed,
    )  # fmt: skip
    result = train(
        ready, data, num_rounds=args.rounds, cohort_size=len(owned), seed=seed,
        eval_every=args.rounds,
    )  # fmt: skip
    return float(np.mean(result.clients["accuracy"])), result.test.get("global/accuracy", np.nan)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model, no wrong labels")
    parser.add_argument("--arms", default="sites,public,wrong", help="of sites, public, wrong")
    parser.add_argument("--items", type=int, default=4000, help="programs of all sites together")
    parser.add_argument("--test", type=int, default=60, help="test programs of each family")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--local_steps", type=int, default=25, help="of a site in a round")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3, help="of Adam")
    parser.add_argument("--sgd_rate", type=float, default=0.1, help="of SCAFFOLD's steps")
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    if args.quick:
        args.items, args.test, args.rounds, args.local_steps = 120, 4, 2, 3
        args.arms = args.arms.replace(",wrong", "")
    if unknown := set(args.arms.split(",")) - set(ARMS):
        parser.error(f"--arms: there is no {unknown.pop()!r}; choose of {', '.join(ARMS)}")
    began = time.perf_counter()
    reading = Reading(LexerTokenizer(renames=True), 192, 192)
    shape = {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 16}
    if not args.quick:
        shape = {"embed_dim": 64, "num_layers": 2, "mlp_dim": 128}
    model = training.encoder("race-detection", reading, **shape)
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in range(args.seeds):
        made = work(args, seed, reading)
        for part in args.arms.split(","):
            for name, figures in ARMS[part](model, made, args, seed, reading):
                found.setdefault(name, []).append(figures)
                print(
                    f"seed {seed} {name:<28} unseen {figures[0]:.3f}  all {figures[1]:.3f}",
                    flush=True,
                )
    means = {name: [round(float(x), 4) for x in np.mean(v, 0)] for name, v in found.items()}
    result = {
        "name": "hpc_sites", "quick": args.quick, "items": args.items, "rounds": args.rounds,
        "local_steps": args.local_steps, "seeds": args.seeds, "unseen_and_all": means,
        "seconds": round(time.perf_counter() - began),
    }  # fmt: skip
    if "fed_avg" in means:
        gain = means["fed_avg"][0] - means["local"][0]
        result["federated_minus_local"] = round(100 * gain, 2)
    print(json.dumps(result))


def of_sites(model: Model, made: Work, args: argparse.Namespace, seed: int, reading: Reading):
    """`(name, scores)` of lone sites, of algorithms, and of all code in one place."""
    steps = args.rounds * args.local_steps
    most = max(len(rows["label"]) for rows in made.train)
    own = [alone(model, repeated(rows, most), args, steps, seed) for rows in made.train]
    yield "local", score(model, None, made, own)
    for name in ("fed_avg",) if args.quick else ("fed_avg", "scaffold", "fed_per"):
        yield name, federated(name, model, made, args, seed)
    if not args.quick:
        joined = {k: np.concatenate([part[k] for part in made.train]) for k in made.train[0]}
        everyone = alone(model, joined, args, steps * len(made.train), seed)
        yield "central", score(model, everyone, made)


def from_public(model: Model, made: Work, args: argparse.Namespace, seed: int, reading: Reading):
    """`(name, scores)` of a model of public code, and of what sites make of it."""
    drawn = sites(seed + 77, args.items // 4, 1, dialects=PUBLIC).train["public"]
    rows = arrays(drawn, reading)
    base = alone(model, rows, args, args.rounds * args.local_steps, seed)
    yield "public code alone", score(model, base, made)
    model = model._replace(init=lambda key: base)
    yield "public, then fed_avg", federated("fed_avg", model, made, args, seed)
    small = lora(model, 4, targets="linear", trained="head")
    yield "public, then fed_lora", federated("fed_lora", small, made, args, seed)
    size = lambda m: sum(x.size for x in jax.tree.leaves(jax.eval_shape(m.init, KEY).params))
    print(f"fed_lora trains and sends {size(small) / size(model):.3f} of the numbers")


def wrong_labels(model: Model, made: Work, args: argparse.Namespace, seed: int, reading: Reading):
    """`(name, scores)` where one site's labels are inverted."""
    wrong = work(args, seed, reading, WRONG)
    yield "wrong labels, fed_avg", federated("fed_avg", model, wrong, args, seed)
    rules = {
        "median": lambda a: with_robust(a, robust_rules.median),
        "geometric median": lambda a: with_robust(a, robust_rules.geometric_median()),
        "fl_trust": lambda a: with_robust(
            a, robust_rules.fl_trust, root=wrong.root, root_steps=args.local_steps
        ),
    }
    for rule, wrap in rules.items():
        yield f"wrong labels, {rule}", federated("fed_avg", model, wrong, args, seed, wrap)


ARMS = {"sites": of_sites, "public": from_public, "wrong": wrong_labels}


if __name__ == "__main__":
    main()
