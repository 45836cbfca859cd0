"""Scores a trained model on programs that it has never seen, beside the trivial baselines.

    python -m jaxfm.launch.hpc evaluate --model=models/races --cache=programs
    python -m jaxfm.launch.hpc evaluate --model=models/pragmas --test=200
    python -m jaxfm.launch.hpc evaluate --dataracebench_dir=dataracebench/micro-benchmarks

Rows of each split are drawn as they were for training, and what training had is left out. Answers
of a decoder of directives count if exact enumeration confirms them, whatever their text. With
--dataracebench_dir, programs of that benchmark are scored, too, without comments and names: a
program races if one of its loops does, and one without a loop that can be read is not counted.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from jaxfm.config import check as check_fields
from jaxfm.config import check_whole, option
from jaxfm.launch.hpc import pragmas, training, writing
from jaxfm.launch.hpc.completions import Completer
from jaxfm.launch.hpc.training import HEADS
from jaxfm.tasks.hpc import reader as readers
from jaxfm.tasks.hpc.dataracebench import read_folder
from jaxfm.tasks.hpc.pipelines import SHIPPED
from jaxfm.tasks.hpc.reader import Reader
from jaxfm.tasks.hpc.records import Example, drawn, record, splits
from jaxfm.tasks.hpc.records.pragma import question
from jaxfm.tasks.hpc.stored import stored_splits

TESTS = ("in distribution", "unseen coefficients", "unseen family", "longer bodies",
         "other language", "renamed")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What is scored."""

    model: str = option("", "folder of `train`; the default is the model of the package")
    test: int = option(1000, "programs drawn for each split")
    items: int = option(
        0, "training programs, for baselines and to leave duplicates out; 0: those of the model"
    )
    baselines: bool = option(True, "train and score the baselines, too")
    cache: str = option("", "folder in which drawn programs are kept; empty: they are not")
    processes: int = option(1, "how many draw programs")
    dataracebench_dir: str = option("", "a folder of DataRaceBench's programs")
    format: Literal["text", "json"] = option("text", "how figures are shown")

    def __post_init__(self):
        check_fields(self)
        check_whole(self, {"test": 1, "items": 0, "processes": 1})


CONFIG = EvaluateConfig
Figures = dict[str, dict[str, Any]]


def scores(reader: Reader, rows: dict[str, list], names=TESTS, baselines=True) -> Figures:
    """Figures of a model and of the baselines on each split.

    Args:
        reader: The model.
        rows: Of `records.splits`; "train" is what baselines learn from.
        names: Of the splits that are scored.
        baselines: Whether they are trained.

    Returns:
        By split, by "model" or a baseline's name: the figures of the record, and how many rows.
    """
    task = record(reader.task)
    found: Figures = {}
    for name in names:
        test = rows[name]
        labels = np.array([row.label for row in test])
        chances = training.predict(reader, test)
        figures = task.metric(list(labels), list(chances))
        if "safe_below" in reader.facts:
            figures |= training.safe_figures(labels, chances, reader.facts["safe_below"])
        if task.place and HEADS[reader.task].head == "locate":
            figures |= task.place(test, training.ranked_lines(reader, test))
        found[name] = {"rows": len(test), "model": figures}
    if baselines:
        joined = [row for name in names for row in rows[name]]
        pairs = HEADS[reader.task].head == "embed"  # predictions are of pairs of a split's rows
        for kind, baseline in task.baselines.items():
            said = np.zeros(0) if pairs else np.asarray(baseline(rows["train"], joined))
            for name in names:
                own, said = said[: len(rows[name])], said[len(rows[name]) :]
                own = np.asarray(baseline(rows["train"], rows[name])) if pairs else own
                found[name][kind] = task.metric([row.label for row in rows[name]], list(own))
        for kind, baseline in (task.place_baselines or {}).items():
            for name in names:
                lines = baseline(rows["train"], rows[name])
                found[name][kind] = task.place(rows[name], lines) if task.place else {}
    return found


def rows_for(reader: Reader, items: int, test: int, folder="", processes=1) -> dict[str, list]:
    """The splits that a model is scored on; those of "cost" have programs, and are not kept.

    Args:
        reader: The model; its facts say with which seed it was trained.
        items, test: Programs drawn to train on, and for each other split.
        folder, processes: See `stored_splits`.
    """
    names, seed = ("train", *TESTS), int(reader.facts.get("data_seed", 0))
    if reader.task == "cost":
        return splits(record(reader.task), seed, items, test, names)
    return stored_splits(reader.task, seed, items, test, names, folder=folder, processes=processes)


def questions_for(
    seed: int, items: int, test: int, names=TESTS, folder="", processes=1
) -> tuple[list[Example], dict[str, list[Example]]]:
    """The training rows of T2, and those of each split that training lacks, with their programs."""
    kept = stored_splits(pragmas.TASK, seed, items, test, folder=folder, processes=processes)
    tests = {}
    for name in names:
        sources = {row.source for row in kept[name]}
        drawn_again = drawn(record(pragmas.TASK), seed, name, 0, test)
        tests[name] = [row for row in drawn_again if row.source in sources]
    return kept["train"], tests


def decoder_scores(
    completer: Completer, rows: list[Example], tests: dict[str, list[Example]], baselines=True
) -> Figures:
    """Figures of a decoder of directives, and of the baselines, on each split; see `writing`."""
    found: Figures = {}
    for split, own in tests.items():
        asked = [question(row) for row in own]
        found[split] = {"rows": len(own), "model": writing.figures(writing.write(completer, asked))}
        for kind, baseline in record(pragmas.TASK).baselines.items() if baselines else ():
            texts = [str(text) for text in baseline(rows, own)]
            found[split][kind] = writing.figures(writing.judged(asked, texts))
    return found


def benchmark_scores(reader: Reader, folder: str) -> dict[str, float]:
    """Figures on a folder of DataRaceBench; see the module."""
    programs = read_folder(folder)
    whole = reader.task != "race-detection"
    texts = [(p.source,) if whole else p.loops for p in programs]
    flat = [text for part in texts for text in part]
    said = iter(readers.probabilities(reader.outputs(flat)) if flat else ())
    chances = [max((next(said) for _ in part), default=None) for part in texts]
    known = [(p, float(c)) for p, c in zip(programs, chances) if c is not None]
    if not known:
        return {"programs": len(programs), "support": 0.0}
    labels, values = np.array([p.label for p, _ in known]), np.array([c for _, c in known])
    right = (values > 0.5) == labels
    groups: dict[str, list[bool]] = {}
    for (program, _), one in zip(known, right):
        groups.setdefault(program.group, []).append(bool(one))
    return {
        "programs": len(programs),
        "support": len(known) / len(programs),
        "accuracy_by_group": float(np.mean([np.mean(g) for g in groups.values()])),
        **record(reader.task).metric(list(labels), list(values)),
    }


def _of_decoder(config: EvaluateConfig, completer: Completer) -> Figures:
    if config.dataracebench_dir:
        raise ValueError(
            "DataRaceBench asks whether programs race, and this model writes directives; give one "
            "of --task=race-detection or program-race."
        )
    items = config.items or int(completer.facts.get("items", 30000))
    seed = int(completer.facts.get("data_seed", 0))
    rows, tests = questions_for(
        seed, items, config.test, folder=config.cache, processes=config.processes
    )
    return decoder_scores(completer, rows, tests, config.baselines)


def main(config: EvaluateConfig, say: Callable[[str], None] = print) -> None:
    """Scores and prints."""
    folder = pathlib.Path(config.model or SHIPPED / "race-detection")
    given = config.test, config.cache, config.processes
    if (folder / pragmas.FILE).exists():
        found = _of_decoder(config, pragmas.load(folder))
    else:
        reader = readers.load(folder)
        rows = rows_for(reader, config.items or int(reader.facts.get("items", 30000)), *given)
        found = scores(reader, rows, baselines=config.baselines)
        if config.dataracebench_dir:
            found["DataRaceBench"] = {"model": benchmark_scores(reader, config.dataracebench_dir)}
    if config.format == "json":
        say(json.dumps(found, indent=2))
        return
    for name, by_kind in found.items():
        say(f"{name} ({by_kind.get('rows', by_kind['model'].get('programs'))} programs)")
        for kind, figures in by_kind.items():
            if isinstance(figures, dict):
                shown = ", ".join(f"{key} {value:.3f}" for key, value in figures.items())
                say(f"  {kind}: {shown}")
