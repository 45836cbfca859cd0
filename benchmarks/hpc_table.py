"""Encoders of HPC code beside trivial baselines, the proof, and a compiler.

    python benchmarks/hpc_table.py [--quick] [--cache=FOLDER] [--processes=2] [--items=30000]

T1: does a loop race under its directive? An encoder that reads the dependence graph and one that
does not are trained on the same loops, and scored on loops like those, with unseen coefficients, of
unseen families, with longer bodies, in Fortran, and with other names. Beside them: 1-5-grams on the
same rows, a classifier that reads the kinds of edges of the graph and no tokens, the proof for all
sizes alone (what it cannot tell counts as not safe), the proof with the model where it cannot tell,
and gcc's auto-parallelizer on some of the loops. A loop is called race-free below the threshold
that was chosen on validation rows.

T3: the same for whole OpenMP functions, with the lines of the race. T4: which loops do the same, by
the cosine of an encoder's vectors, beside words in common. T5: the logarithm of the operations,
beside a linear model. T6: which configuration of a loop costs least, beside the best fixed one.

The last line is one JSON object. t1_* are of loops like those trained on, unless their name says
more; t1_safe_* is precision and recall of "race-free" there, and for unseen families by name.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Sequence

import numpy as np

from jaxfm.launch.hpc import evaluate, train, training
from jaxfm.tasks.hpc.generator import generate
from jaxfm.tasks.hpc.graph import RELATIONS, edges
from jaxfm.tasks.hpc.lexer import compact
from jaxfm.tasks.hpc.proofs.integer_sets import for_all_sizes
from jaxfm.tasks.hpc.reader import Reader
from jaxfm.tasks.hpc.records import Example, drawn, record
from jaxfm.tasks.hpc.verifiers import auto_parallelizer

T1, T3 = "race-detection", "program-race"
TOKENS = {"lexer-renamed": 128, "lexer": 128, "bpe": 112, "byte": 200}  # and most of a loop
_PLAIN = {"flows into", "subscript", "same name", "loop of", "inner loop of"}


def features(source: str) -> list[str]:
    """The kinds of edges of a source, and all kinds that meet in one place of it."""
    places: dict[int, set[str]] = {}
    found = []
    for edge in edges(compact(source)):
        name = RELATIONS[edge.relation]
        if name not in _PLAIN:
            places.setdefault(edge.first, set()).add(name)
            found.append(name)
    return found + ["|".join(sorted(kinds)) for kinds in places.values()]


def graph_alone(train_rows: Sequence[Example], test: Sequence[Example]) -> np.ndarray:
    """Logistic regression on `features`: what the graph gives away without any network."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    counts = CountVectorizer(analyzer=lambda text: features(text), binary=True)
    rows = counts.fit_transform([row.source for row in train_rows])
    model = LogisticRegression(max_iter=500).fit(rows, [row.label for row in train_rows])
    return model.predict_proba(counts.transform([row.source for row in test]))[:, 1]


def proof_figures(reader: Reader, split: str, count: int, seed: int) -> dict[str, float]:
    """The proof alone, and with the model where it cannot tell, on fresh loops of a split."""
    rows = drawn(record(T1), seed, split, 0, count)
    said = [for_all_sizes(row.item.program).verdict for row in rows if row.item]
    labels = np.array([row.label for row in rows])
    told = np.array([verdict != "cannot tell" for verdict in said])
    proved = np.array([verdict == "refuted" for verdict in said], float)
    both = np.where(told, proved, training.predict(reader, rows))
    below = reader.facts["safe_below"]
    return {
        "rows": len(rows),
        "told": float(told.mean()),
        "wrong": float((proved != labels)[told].mean()) if told.any() else 0.0,
        "safe_recall": float(((proved == 0) & told)[labels == 0].mean()),
        "with_model_accuracy": float(((both > 0.5) == labels).mean()),
        **{f"with_model_{k}": v for k, v in training.safe_figures(labels, both, below).items()},
    }


def compiler_figures(count: int, seed: int) -> dict[str, float | str]:
    """gcc's auto-parallelizer on loops like those trained on; "safe" is what it makes parallel."""
    if reason := auto_parallelizer.available():
        return {"reason": reason}
    rows = [row for row in drawn(record(T1), seed, "in distribution", 0, count) if row.item]
    verdicts = auto_parallelizer.verify([row.item.program for row in rows if row.item])
    labels = np.array([row.label for row in rows])
    safe = np.array([j.verdict == "confirmed" for j in verdicts])
    return {
        "tool": auto_parallelizer.name(),
        "rows": len(rows),
        "accuracy": float((safe == (labels == 0)).mean()),
        "safe_precision": float((labels == 0)[safe].mean()) if safe.any() else float("nan"),
        "safe_recall": float(safe[labels == 0].mean()),
    }


def settings(args: argparse.Namespace, task: str, graph: bool) -> train.TrainConfig:
    """Of the training of one model."""
    data = train.DataSettings(
        items=args.items, validation=args.test, cache=args.cache, processes=args.processes,
        seed=args.seed,
    )  # fmt: skip
    small = train.Shape(embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16)
    return train.TrainConfig(
        out="", task=task, graph=graph, steps=args.steps, seed=args.seed, data=data,
        model=small if args.quick else train.Shape(),
    )  # fmt: skip


def scored(reader: Reader, args: argparse.Namespace, baselines: bool) -> evaluate.Figures:
    """All splits that a task has, with figures."""
    items = args.items or int(reader.facts["items"])
    rows = evaluate.rows_for(reader, items, args.test, args.cache, args.processes)
    found = evaluate.scores(reader, rows, baselines=baselines)
    if baselines and reader.task == T1:
        for name in evaluate.TESTS:
            said = graph_alone(rows["train"], rows[name])
            labels = [row.label for row in rows[name]]
            found[name]["graph alone"] = record(T1).metric(labels, list(said))
    return found


def show(title: str, found: evaluate.Figures, keys: Sequence[str]) -> None:
    """A table of splits and kinds."""
    print(f"\n{title}: {', '.join(keys)}")
    for name, kinds in found.items():
        print(f"  {name} ({kinds['rows']} rows)")
        for kind, figures in kinds.items():
            if isinstance(figures, dict):
                print(
                    f"    {kind:<16}", *(f"{figures.get(key, float('nan')):8.3f}" for key in keys)
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny models on few loops; T1 only")
    parser.add_argument(
        "--parts", default="t1,t3,t4,t5,t6", help="tasks, with commas; also: tokenizers"
    )
    parser.add_argument(
        "--items", type=int, default=0, help="programs to train on; 0: the task's own"
    )
    parser.add_argument("--test", type=int, default=1000, help="programs of each other split")
    parser.add_argument("--steps", type=int, default=3000, help="of the optimizer, each model")
    parser.add_argument("--tools", type=int, default=300, help="loops for the proof and gcc")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", default="", help="folder in which drawn programs are kept")
    parser.add_argument("--processes", type=int, default=1, help="how many draw programs")
    args = parser.parse_args()
    parts = args.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: there is no {unknown.pop()!r}; choose of {', '.join(PARTS)}")
    if args.quick:
        args.items, args.test, args.steps, args.tools = 200, 40, 20, 40
    began, clock = time.process_time(), time.perf_counter()
    count = min(args.items or 2000, 2000)
    generate(args.seed, count)
    result: dict = {
        "name": "hpc_table", "quick": args.quick, "items": args.items or "of each task",
        "test": args.test, "steps": args.steps, "seed": args.seed, "machine": platform.machine(),
        "islpy": importlib.metadata.version("islpy"),
        "generator_items_per_s": round(count / (time.process_time() - began)),
    }  # fmt: skip
    for part in parts:
        result |= PARTS[part](args)
    result["seconds"] = round(time.perf_counter() - clock)
    print(json.dumps(_rounded(result)))


def races_of_loops(args: argparse.Namespace) -> dict:
    """T1."""
    result: dict = {}
    readers = {}
    for graph in (True, False):
        reader = train.trained(settings(args, T1, graph))
        readers[graph] = reader
        found = scored(reader, args, baselines=graph)
        show(f"T1 {'with' if graph else 'without'} the graph", found,
             ("accuracy", "f1", "safe_precision", "safe_recall"))  # fmt: skip
        suffix = "" if graph else "_without_graph"
        for name, kinds in found.items():
            key = f"t1_{name.replace(' ', '_')}"
            result[key + suffix] = kinds["model"]["accuracy"]
            if graph:
                result[f"{key}_ngrams"] = kinds["1-5-grams"]["accuracy"]
                result[f"{key}_graph_alone"] = kinds["graph alone"]["accuracy"]
        like, family = found["in distribution"]["model"], found["unseen family"]["model"]
        for key in ("safe_precision", "safe_recall"):
            result[f"t1_{key}{suffix}"] = like[key]
            result[f"t1_unseen_family_{key}{suffix}"] = family[key]
    for split in ("in distribution", "unseen coefficients", "unseen family"):
        figures = proof_figures(readers[True], split, args.tools, args.seed + 1)
        print(f"proof, {split}:", ", ".join(f"{k} {v:.3f}" for k, v in figures.items()))
        result[f"t1_proof_{split.replace(' ', '_')}"] = figures
    result["t1_gcc"] = compiler_figures(args.tools, args.seed + 1)
    print("gcc:", result["t1_gcc"])
    return result


def races_of_programs(args: argparse.Namespace) -> dict[str, float]:
    """T3."""
    races = scored(train.trained(settings(args, T3, True)), args, baselines=True)
    show("T3", races, ("accuracy", "f1", "pair_hit_at_1", "line_hit_at_1"))
    like = races["in distribution"]
    return {
        "t3_f1": like["model"]["f1"],
        "t3_f1_ngrams": like["1-5-grams"]["f1"],
        "t3_f1_unseen_family": races["unseen family"]["model"]["f1"],
        "t3_pair_hit_at_1": like["model"]["pair_hit_at_1"],
    }


def without_races(
    title: str, task: str, keys: Sequence[str], beside: str
) -> Callable[[argparse.Namespace], dict[str, float]]:
    """T4, T5 or T6: the first of the keys by the model and by a baseline."""

    def part(args: argparse.Namespace) -> dict[str, float]:
        found = scored(train.trained(settings(args, task, True)), args, baselines=True)
        show(title.upper(), found, keys)
        like, family, key = found["in distribution"], found["unseen family"], f"{title}_{keys[0]}"
        return {
            key: like["model"][keys[0]],
            f"{key}_unseen_family": family["model"][keys[0]],
            f"{key}_{beside.replace(' ', '_').replace('-', '_')}": like[beside][keys[0]],
        }

    return part


def by_tokenizer(args: argparse.Namespace) -> dict[str, float]:
    """T1 again with every tokenizer, after as many steps of 16 loops."""
    result = {}
    for name, length in TOKENS.items():
        config = dataclasses.replace(
            settings(args, T1, True), tokenizer=name, max_len=length, batch_size=16
        )
        found = scored(train.trained(config), args, baselines=False)
        show(f"T1, tokenizer {name}", found, ("accuracy", "f1"))
        for split in ("in distribution", "renamed"):
            key = f"t1_{name}_{split}".replace(" ", "_").replace("-", "_")
            result[key] = found[split]["model"]["accuracy"]
    return result


PARTS: dict[str, Callable[[argparse.Namespace], dict]] = {
    "t1": races_of_loops,
    "t3": races_of_programs,
    "t4": without_races("t4", "similarity", ("map_at_r", "auc", "near_miss"), "tf-idf"),
    "t5": without_races("t5", "cost", ("spearman", "pair_accuracy", "factor"), "linear"),
    "t6": without_races("t6", "tuning", ("regret", "best", "within_5_percent"), "best fixed"),
    "tokenizers": by_tokenizer,
}


def _rounded(value):
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
