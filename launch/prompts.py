"""Finds a prompt for a frozen language model over clients whose texts stay where they are.

    python -m jaxfm.launch.prompts
    python -m jaxfm.launch.prompts --bandit=evolution --rounds=40 --noise_multiplier=8
    python -m jaxfm.launch.prompts --model=FOLDER --data.source=reviews.csv \
        --words=negative,positive --templates=templates.txt

Clients score templates and exemplars by the likelihood of the right words; a round sends a number
for each candidate, and a bandit says which ones come next. Exemplars are public rows, which no
client has. Without --data the texts are ends of Python code of the standard library, the words are
the keyword that follows, and packages are the clients; without --model a small model learns the
other files of the library first. The run folder holds config, metrics, checkpoints and report.html
with the ranking; the same command continues a stopped run. The test rows are looked at in the end.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm import config as configs
from jaxfm import hub
from jaxfm.checkpoint import Checkpointer
from jaxfm.config import check, check_whole, option
from jaxfm.data.federation import merge
from jaxfm.data.keywords import KEYWORDS, Keyword, keyword_rows
from jaxfm.data.standard_library import stdlib_documents
from jaxfm.federated.bandits import Bandit, evolution, successive_halving, ucb1
from jaxfm.federated.prompting import (
    Pool,
    Rows,
    SearchState,
    described,
    epsilon,
    first_state,
    log_likelihoods,
    ranking,
    search_prompts,
)
from jaxfm.launch.optimizers import OptimizerConfig, make_optimizer
from jaxfm.launch.pretrain import TrainState, train_steps
from jaxfm.launch.report import write_report
from jaxfm.launch.setup import Data, DataConfig, ModelConfig, load_data, make_model
from jaxfm.log import RunLog, progress
from jaxfm.model import Model, Variables
from jaxfm.parallel.mesh import make_mesh
from jaxfm.parallel.scoring import Score, word_scorer
from jaxfm.run_folder import RUN_DIR_HELP, in_folder, open_run, save_results
from jaxfm.tokenizer import Tokenizer, load_tokenizer

_FOR_CODE = (
    "{text}{label}",
    "# Python\n{text}{label}",
    "```\n{text}{label}\n```",
    "Code:\n{text}\nNext keyword: {label}",
    "{text}\n# keyword: {label}",
    '"""{text}"""\n{label}',
)
_FOR_TEXTS = (
    "{text}\n{label}",
    "{text} It is {label}.",
    "Text: {text}\nLabel: {label}",
    "Question: what is this about? {text}\nAnswer: {label}",
)
_SHOWN = 10  # candidates of the ranking


@dataclasses.dataclass(frozen=True)
class PromptsConfig:
    """A search for a prompt."""

    run_dir: str = option("", RUN_DIR_HELP)
    model: str = option("", "folder or hub name of a causal language model; empty: a small new one")
    steps: int = option(120, "training steps of the new model")
    templates: str = option(
        "", "file with a template a line, {text} before {label}, \\n for a line break"
    )
    words: tuple[str, ...] = option((), "what the model is to say for each class, in their order")
    bandit: Literal["halving", "ucb1", "evolution"] = option("halving", "who is tried next")
    candidates: int = option(12, "templates with exemplars that compete")
    asked: int = option(4, "candidates that are tried in a round")
    shots: int = option(2, "most exemplars of a candidate")
    public: int = option(16, "rows that exemplars are taken from, which no client has")
    rounds: int = option(12, "rounds in all")
    cohort_size: int = option(4, "clients drawn a round")
    rows: int = option(8, "rows by which a client scores in a round")
    drop_rate: float = option(0.0, "probability that a drawn client fails to report")
    clip: float = option(4.0, "log-likelihoods below -clip count as -clip, in nats")
    noise_multiplier: float = option(
        0.0, "deviation of the noise in a round's sums over their sensitivity; 0: none"
    )
    delta: float = option(1e-5, "of the differential privacy that the noise gives")
    test_examples: int = option(128, "test rows looked at in the end")
    seed: int = option(0, "of clients, candidates and rounds")
    data: DataConfig = DataConfig()

    def __post_init__(self):
        check(self)
        least = {"steps": 0, "candidates": 1, "asked": 1, "shots": 0, "public": 0, "rounds": 1,
                 "cohort_size": 1, "rows": 1, "test_examples": 1, "seed": 0}  # fmt: skip
        check_whole(self, least)
        if self.asked > self.candidates:
            raise ValueError(f"asked={self.asked}: there are only candidates={self.candidates}.")
        if self.cohort_size > self.data.num_clients:
            raise ValueError(
                f"cohort_size={self.cohort_size}: there are only "
                f"data.num_clients={self.data.num_clients}."
            )
        for name, fits, wanted in (
            ("drop_rate", 0 <= self.drop_rate < 1, "a probability from 0 and below 1"),
            ("clip", 0 < self.clip < math.inf, "a number of nats above 0"),
            ("noise_multiplier", 0 <= self.noise_multiplier < math.inf, "0 or a number above"),
            ("delta", 0 < self.delta < 1, "a probability above 0 and below 1"),
        ):
            if not fits:
                raise ValueError(f"{name}={getattr(self, name)}: give {wanted}.")
        if self.data.source != "stdlib" and not self.model:
            raise ValueError(
                f"data.source={self.data.source} requires --model: a small new model knows nothing "
                "but Python's library."
            )


class Problem(NamedTuple):
    """What is searched: the pool, the clients' private rows, the server's test rows."""

    pool: Pool
    clients: list[Rows]
    names: list[str]
    test: Rows


def code_problem(config: PromptsConfig) -> Problem:
    """Keywords of files that the small model does not learn; exemplars are of those it does."""
    rows = keyword_rows(stdlib_documents(), length=72)
    gather = lambda rows: Rows(tuple(r.text for r in rows), np.array([r.label for r in rows], int))
    by_owner: dict[str, list[Keyword]] = {}
    for row in rows:
        if row.split == "validation":
            by_owner.setdefault(row.owner, []).append(row)
    largest = sorted(by_owner, key=lambda owner: (-len(by_owner[owner]), owner))
    names = largest[: config.data.num_clients]
    pool = Pool(
        templates_of(config, _FOR_CODE),
        gather([row for row in rows if row.split == "train"][: config.public]),
        config.words or KEYWORDS,
    )
    test = [row for row in rows if row.split == "test"][: config.test_examples]
    return Problem(pool, [gather(by_owner[name]) for name in names], names, gather(test))


def text_problem(config: PromptsConfig, data: Data) -> Problem:
    """Labelled texts of a file, as they were dealt to clients; exemplars are validation rows."""
    if not data.classes or data.tokenizer is None:
        raise ValueError(
            f"data.source={config.data.source} holds no labelled texts, which a prompt is found by."
        )
    if config.words and len(config.words) != len(data.classes):
        raise ValueError(
            f"words={config.words}: give one for each of the classes {', '.join(data.classes)}."
        )
    tokenizer = data.tokenizer

    def rows(examples: Any, chosen: Sequence[int] | np.ndarray) -> Rows:
        tokens, mask = np.asarray(examples["tokens"]), np.asarray(examples["mask"], bool)
        texts = tuple(tokenizer.decode(tokens[i][mask[i]].tolist()) for i in chosen)
        return Rows(texts, np.asarray(examples["label"])[np.asarray(chosen, int)])

    some = lambda part, most: rows(part, range(min(most, len(part["label"]))))
    pool = Pool(
        templates_of(config, _FOR_TEXTS), some(data.validation, config.public),
        config.words or data.classes,
    )  # fmt: skip
    train = data.train
    clients = [rows(train.examples, train.rows_of(i)) for i in range(len(data.names))]
    return Problem(pool, clients, list(data.names), some(data.test, config.test_examples))


def templates_of(config: PromptsConfig, usual: tuple[str, ...]) -> tuple[str, ...]:
    """The templates of the file, or the usual ones."""
    if not config.templates:
        return usual
    lines = pathlib.Path(config.templates).read_text(encoding="utf-8").splitlines()
    return tuple(line.replace("\\n", "\n") for line in lines if line.strip())


def small_model(config: PromptsConfig) -> tuple[Model, Variables, Tokenizer]:
    """A model of bytes that has learned the library's training files for some steps."""
    data = load_data(DataConfig(length=192), config.seed)
    sizes = ModelConfig(embed_dim=64, num_layers=2, num_heads=4, mlp_dim=192)
    model = make_model(sizes, data)
    model = model._replace(config=dataclasses.replace(model.config, max_len=512))
    optimizer = make_optimizer(OptimizerConfig())
    variables = model.init(jax.random.key(config.seed))
    key = jax.random.key(config.seed + 1)
    state = TrainState(variables, optimizer.init(variables.params), jnp.zeros((), jnp.int32), key)
    if config.steps:
        run = train_steps(model, data.task, optimizer, 16, config.steps, make_mesh())
        state, losses = run(state, jax.device_put(merge(data.train)))
        print(f"A small model learned for {config.steps} steps: {float(losses[-1]):.2f} nats.")
    assert data.tokenizer is not None
    return model, state.variables, data.tokenizer


def bandit_of(config: PromptsConfig, pool: Pool) -> Bandit:
    """The bandit by its name."""
    if config.bandit == "halving":
        return successive_halving(config.candidates, config.rounds, config.asked)
    if config.bandit == "ucb1":
        return ucb1(config.asked)
    return evolution(len(pool.templates), len(pool.exemplars.texts), config.asked)


def search(config: PromptsConfig, problem: Problem, score: Score) -> SearchState:
    """Runs all rounds, or those that remain after a restart."""
    pool = problem.pool
    state = first_state(pool, config.candidates, config.shots, jax.random.key(config.seed))
    with Checkpointer(pathlib.Path(config.run_dir) / "checkpoints", keep=2) as checkpoints:
        done = 0
        if checkpoints.latest_step() is not None:
            done, state = checkpoints.restore(like=state)
            print(f"Continuing after round {done}, from {checkpoints.folder}.")
        rounds = search_prompts(
            score, pool, problem.clients, bandit_of(config, pool), state,
            num_rounds=config.rounds, cohort_size=min(config.cohort_size, len(problem.clients)),
            rows_a_round=config.rows, clip=config.clip, drop_rate=config.drop_rate,
            noise_multiplier=config.noise_multiplier,
        )  # fmt: skip
        with RunLog(config.run_dir, resume_step=done or None) as log:
            for number in progress(range(done + 1, config.rounds + 1), "rounds"):
                state, report = next(rounds)
                real = report.asked >= 0
                log.write(number, {
                    "reward": float(report.mean[real].mean()),
                    "clients": len(report.clients),
                    "alive": int(state.arms.alive.sum()),
                })  # fmt: skip
                checkpoints.save(number, state)
    return state


def measured(
    score: Score, pool: Pool, template: int, exemplars: Sequence[int], rows: Rows
) -> dict[str, float]:
    """Accuracy and mean log-likelihood of a prompt on rows."""
    logp = log_likelihoods(score, pool, template, exemplars, rows)
    right = logp.argmax(-1) == rows.labels
    return {
        "accuracy": float(right.mean()),
        "log_likelihood": float(logp[np.arange(len(right)), rows.labels].mean()),
    }


def main(config: PromptsConfig) -> None:
    """Searches, tests the winner beside a template without exemplars, and writes the report."""
    config = in_folder(config, "prompts", config.data.source)
    run_dir = open_run(config, config.run_dir)
    if config.data.source == "stdlib":
        problem = code_problem(config)
    else:
        sizes = ModelConfig(family=config.model)
        problem = text_problem(config, load_data(config.data, config.seed, sizes))
    if config.model:
        model, variables = hub.load(config.model)
        tokenizer: Tokenizer = load_tokenizer(config.model)
    else:
        model, variables, tokenizer = small_model(config)
    score = word_scorer(model, variables, tokenizer)
    state = search(config, problem, score)
    arms, order = state.arms, ranking(state.arms)
    if not order:
        raise ValueError("No client reported a finite score; there is no ranking.")
    won = order[0]
    exemplars = np.asarray(arms.exemplars[won]).tolist()
    best = measured(score, problem.pool, int(arms.template[won]), exemplars, problem.test)
    first = measured(score, problem.pool, 0, (), problem.test)
    part: dict[str, Any] = {
        "rounds": config.rounds,
        "bandit": config.bandit,
        "clients": len(problem.clients),
        "candidates": config.candidates,
        "ranking": [described(problem.pool, arms, arm) for arm in order[:_SHOWN]],
        "test": best,
        "first_template": first,
        "bytes_up": 4.0 * config.rounds * config.cohort_size * config.asked,
        "epsilon": str(epsilon(config.noise_multiplier, config.rounds, config.delta)),
        "delta": config.delta,
    }
    save_results(run_dir, "prompts", part)
    print(f"best template: {part['ranking'][0]['template']!r}")
    print(f"exemplars: {len(part['ranking'][0]['exemplars'])}")
    for name, value in best.items():
        print(f"test {name}: {value:.4f} (the first template alone: {first[name]:.4f})")
    if config.noise_multiplier:
        print(f"epsilon: {float(part['epsilon']):.2f} at delta={config.delta}")
    print(f"report: {write_report(run_dir)}")


if __name__ == "__main__":
    configs.run(main, PromptsConfig)
