"""Directives that a decoder writes, under the grammar of each loop, and that proofs then judge.

The first answer to a question is the greedy one; others are drawn. The first that the verifiers
pass is kept, so what is kept and verified is right whatever the decoder knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from jaxfm.launch.hpc.completions import Completer, prompt_ids
from jaxfm.model import Model, Variables
from jaxfm.parallel.decode import Decoder
from jaxfm.parallel.decoders.lookup import lookup
from jaxfm.parallel.generation import generate
from jaxfm.parallel.verified import Choice, first_verified
from jaxfm.tasks.hpc.directives import PROOFS, Question, grammar_of, in_order, prompt, verified
from jaxfm.tasks.hpc.lexer import rename, restore
from jaxfm.tasks.hpc.pragma_grammar import NONE
from jaxfm.tasks.hpc.program import Program
from jaxfm.tasks.hpc.records.pragma import not_trivial
from jaxfm.tasks.hpc.records.translation import questions, translated
from jaxfm.tasks.hpc.render import Language
from jaxfm.tasks.hpc.verifiers.verifier import Verifier

MAX_TOKENS = 64  # of a directive


class Written(NamedTuple):
    """What was written for one question.

    Attributes:
        question: What was asked.
        answers: The greedy one, then the drawn ones.
        right: Of each, whether the verifiers confirm it.
    """

    question: Question
    answers: tuple[str, ...]
    right: tuple[bool, ...]

    def kept(self) -> Choice[str]:
        """The first that is right."""
        judged = dict(zip(self.answers, self.right))
        return first_verified(self.answers, judged.__getitem__)


def write(
    completer: Completer,
    asked: Sequence[Question],
    *,
    num_samples: int = 5,
    temperature: float = 0.8,
    seed: int = 0,
    batch: int = 32,
    make: Callable[[Model, Variables], Decoder] = lookup,
    verifiers: Sequence[Verifier] = PROOFS,
) -> list[Written]:
    """Writes directives and judges them.

    Args:
        completer: Trained on questions of T2, with names by their order.
        asked: Loops.
        num_samples: Answers to each, the greedy one among them.
        temperature: Of the others.
        seed: Of their draws.
        batch: Questions that are answered at once.
        make: The decoder, for example `lookup` or `plain`; all write the same greedy answers.
        verifiers: What an answer must pass.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples}: give 1 or more.")
    if not temperature > 0 and num_samples > 1:
        raise ValueError(f"temperature={temperature}: samples differ only above 0.")
    decoder = make(completer.model, completer.variables)
    found: list[Written] = []
    for first in range(0, len(asked), batch):
        part = asked[first : first + batch]
        texts = answers(
            decoder, completer, part,
            temperatures=[0.0] + [temperature] * (num_samples - 1), seed=seed + first,
        )  # fmt: skip
        pairs = [(q, text) for q, own in zip(part, texts) for text in dict.fromkeys(own)]
        said = {pair: v.verdict == "confirmed" for pair, v in zip(
            ((id(q), text) for q, text in pairs), verified(pairs, verifiers))}  # fmt: skip
        found += [
            Written(q, own, tuple(said[id(q), text] for text in own)) for q, own in zip(part, texts)
        ]
    return found


def answers(
    decoder: Decoder,
    completer: Completer,
    asked: Sequence[Question],
    *,
    temperatures: Sequence[float] = (0.0,),
    seed: int = 0,
) -> list[tuple[str, ...]]:
    """One answer to each question at each temperature, under its loop's grammar."""
    short = [in_order(q._replace(source=prompt(q.source, completer.noted))) for q in asked]
    each = len(temperatures)
    texts = generate(
        decoder,
        [prompt_ids(q.source, completer.tokenizer) for q in short],
        grammar=[pattern for q in short for pattern in [grammar_of(q)] * each],
        tokenizer=completer.tokenizer,
        stop_tokens=completer.tokenizer.eos_id,
        max_new_tokens=MAX_TOKENS, num_samples=each,
        temperature=list(temperatures) * len(asked), key=jax.random.key(seed),
    ).text  # fmt: skip
    assert texts is not None
    back = [rename(q.source).names for q in asked]
    return [
        tuple(restore(text, names) for text in texts[each * i : each * (i + 1)])
        for i, names in enumerate(back)
    ]


def figures(written: Sequence[Written]) -> dict[str, float]:
    """The shares of questions answered right: greedily, by a sample, by the first that passes.

    "_not_trivial" is of the questions whose answer has clauses or is a refusal.
    """
    found: dict[str, float] = {}
    for suffix, kept in (("", lambda _: True), ("_not_trivial", not_trivial)):
        rows = [w for w in written if kept(w.question.answer)]
        if not rows:
            continue
        most = len(rows[0].right)
        share = lambda hits: sum(hits) / len(rows)  # noqa: B023
        found[f"verified_at_1{suffix}"] = share(w.right[0] for w in rows)
        found[f"exact_at_1{suffix}"] = share(w.answers[0] == w.question.answer for w in rows)
        if most > 1:
            drawn = [sum(w.right[1:]) / (most - 1) for w in rows]
            found[f"verified_at_1_drawn{suffix}"] = share(drawn)
            found[f"verified_at_{most}{suffix}"] = share(any(w.right) for w in rows)
    return found


def judged(
    asked: Sequence[Question], texts: Sequence[str], verifiers: Sequence[Verifier] = PROOFS
) -> list[Written]:
    """One given answer to each question, for example a baseline's."""
    said = verified(list(zip(asked, texts)), verifiers)
    return [
        Written(q, (text,), (v.verdict == "confirmed",)) for q, text, v in zip(asked, texts, said)
    ]


def translate(
    completer: Completer,
    programs: Sequence[Program],
    language: Language = "c",
    *,
    checked: bool = False,
    **settings,
) -> list[str]:
    """Serial programs as parallel functions: directives before outer loops (T8).

    Args:
        completer: As of `write`.
        programs: Without directives.
        language: Of the functions.
        checked: Whether the first answer that the verifiers pass is taken, or no directive where
            none passes; else the greedy one.
        settings: Of `write`.
    """
    asked = [questions(program, language) for program in programs]
    settings = settings if checked else {"num_samples": 1} | settings
    written = iter(write(completer, [q for own in asked for q in own], **settings))
    texts = []
    for program, own in zip(programs, asked):
        found = [next(written) for _ in own]
        kept = [w.kept() for w in found]
        chosen = [
            choice.answer if choice.index is not None else NONE if checked else w.answers[0]
            for w, choice in zip(found, kept)
        ]
        answered = [(q.path, text) for q, text in zip(own, chosen)]
        texts.append(translated(program, answered, language))
    return texts
