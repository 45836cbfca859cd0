"""Texts from prompts with any decoder: one call, or a stream of pieces.

>>> from jaxfm.models.families.decoder import DecoderConfig, decoder
>>> from jaxfm.parallel.decoders.plain import plain
>>> model = decoder(DecoderConfig(vocab_size=8, embed_dim=8, num_layers=1, num_heads=1, mlp_dim=8))
>>> variables = model.init(jax.random.key(0))
>>> result = generate(plain(model, variables), [[1, 2, 3], [4]], max_new_tokens=5)
>>> [len(tokens) for tokens in result.tokens]
[5, 5]
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from jaxfm.model import Key
from jaxfm.parallel.decode import Decoder, DecoderFunctions
from jaxfm.parallel.mesh import put
from jaxfm.parallel.sampling import Sampling
from jaxfm.parallel.stop import HIT, Detokenizer, automaton
from jaxfm.parallel.verification import Rules, Stats, Text
from jaxfm.tokenizer import Tokenizer, same_vocabulary


class TextPiece(NamedTuple):
    """What a chunk of ticks added.

    Attributes:
      tokens: new ids of each request.
      text: new text of each request, where a tokenizer was given; never taken back later.
    """

    tokens: list[np.ndarray]
    text: list[str] | None


class Generation(NamedTuple):
    """What was generated, prompts not included; lists have one entry a request.

    Attributes:
      tokens: i32 ids; the stop token, or the tokens that complete a stop string, are the last.
      text: where a tokenizer was given; without stop token and stop string.
      logprobs: f32, the model's log-softmax at each token (before temperature and cuts).
      finish: "length", "stop token" or "stop string".
      stats: counts as NumPy arrays.
      counters: the decoder's own counts, where it keeps some.
      decoder: as it came out of it: with a policy, what it has learned goes on in the next call.
    """

    tokens: list[np.ndarray]
    text: list[str] | None
    logprobs: list[np.ndarray] | None
    finish: list[str]
    stats: Stats
    counters: Any = None
    decoder: Decoder | None = None


def generate(decoder: Decoder, prompts: Sequence, **settings: Any) -> Generation:
    """Continues prompts to their ends; arguments and errors of `stream`."""
    pieces = stream(decoder, prompts, **settings)
    while True:
        try:
            next(pieces)
        except StopIteration as stop:
            return stop.value


def stream(
    decoder: Decoder,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int] = 64,
    temperature: float | Sequence[float] = 0.0,
    top_k: int | Sequence[int] | None = None,
    top_p: float | Sequence[float] | None = None,
    min_p: float | Sequence[float] | None = None,
    key: Key | None = None,
    stop_tokens: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    draft_tokenizer: Tokenizer | None = None,
    logprobs: bool = False,
    ticks: int = 16,
    cells: int | None = None,
    prefill_chunk: int | None = None,
) -> Iterator[TextPiece]:
    """Continues prompts, yielding a TextPiece after every `ticks` passes; returns `Generation`.

    The ticks of a piece run as one loop on the device, and all pieces of all calls with the same
    shapes (number of prompts, cells, bucket of prompt lengths, settings that are on) share one
    compiled functions.

    Args:
      decoder: of `plain`, `lookup`, `speculative`.
      prompts: token ids, or strings where a tokenizer is given; lengths may differ.
      max_new_tokens: most tokens generated, for all requests or for each.
      temperature: for all or each; 0 is greedy. See `jaxfm.parallel.sampling`.
      top_k, top_p, min_p: for all or each; None is off.
      key: typed key, needed when a temperature is above 0.
      stop_tokens: a text ends with the first of these.
      stop_strings: a text ends before the first of these; needs a tokenizer.
      tokenizer: of the model.
      draft_tokenizer: of the drafting model; its vocabulary is compared with `tokenizer`'s.
      logprobs: whether to return them.
      ticks: passes between pieces.
      cells: tokens that the cache holds of each text; by default just enough, in steps of 128.
      prefill_chunk: tokens of the prompts read in one pass; None: all. Bounds memory.
    Raises:
      ValueError: an empty prompt, a token outside the vocabulary, a text longer than the cache or
        the model's positions, different vocabularies, a setting out of range.
    """
    ids = _prompt_ids(prompts, tokenizer, decoder.vocab_size)
    _check_tokenizers(tokenizer, draft_tokenizer, stop_strings)
    if ticks < 1:
        raise ValueError(f"ticks={ticks}: a piece takes 1 or more.")
    if prefill_chunk is not None and prefill_chunk < 1:
        raise ValueError(f"prefill_chunk={prefill_chunk} must be 1 or more, or None.")
    batch = len(ids)
    lengths = np.array([len(prompt) for prompt in ids], np.int32)
    limits = lengths + _per_request("max_new_tokens", max_new_tokens, batch, np.int32, at_least=1)
    cells = _check_room(lengths, limits, cells, decoder.max_len)
    sampling = _sampling(batch, temperature, top_k, top_p, min_p, key)
    token_bytes: list[bytes] = []
    if tokenizer is not None:
        # A model may have more rows than its tokenizer has tokens (padding).
        token_bytes = list(tokenizer.token_bytes())
        token_bytes += [b""] * (decoder.vocab_size - len(token_bytes))
    rules = _rules(sampling, stop_tokens, stop_strings, token_bytes, decoder.vocab_size)
    text = _text(ids, limits, cells, decoder.draft_length, logprobs)
    make = lambda: Detokenizer(token_bytes, stop_strings)
    writers = [make() for _ in ids] if tokenizer is not None else None
    width = min(_bucket(lengths.max()), cells)
    return _run(decoder, text, rules, width, ticks, prefill_chunk, writers)


def _check_tokenizers(
    tokenizer: Tokenizer | None, draft: Tokenizer | None, stop_strings: Sequence[str]
) -> None:
    if draft is not None:
        if tokenizer is None:
            raise ValueError("draft_tokenizer is given without tokenizer; give both to compare.")
        if not same_vocabulary(tokenizer, draft):
            raise ValueError(_vocabulary_difference(tokenizer, draft))
    if stop_strings and tokenizer is None:
        raise ValueError("stop_strings need a tokenizer, to know the text of each token.")


def _rules(
    sampling: Sampling, stop_tokens: Sequence[int], stop_strings: Sequence[str],
    token_bytes: list[bytes], vocab_size: int,
) -> Rules:  # fmt: skip
    for token in stop_tokens:
        if not 0 <= token < vocab_size:
            raise ValueError(f"Stop token {token} is outside 0..{vocab_size - 1}.")
    table = jnp.asarray(automaton(stop_strings, token_bytes[:vocab_size])) if stop_strings else None
    return Rules(sampling, jnp.asarray(np.array(stop_tokens, np.int32)), table)


def _text(
    ids: list[list[int]], limits: np.ndarray, cells: int, drafts: int, logprobs: bool
) -> Text:
    """The prompts as texts that may grow up to `limits`."""
    batch = len(ids)
    tokens = np.zeros((batch, cells), np.int32)
    for row, prompt in zip(tokens, ids, strict=True):
        row[: len(prompt)] = prompt
    zeros = lambda *shape: jnp.zeros((batch, *shape), jnp.int32)
    return Text(
        tokens=jnp.asarray(tokens),
        length=jnp.asarray(np.array([len(prompt) for prompt in ids], np.int32)),
        limit=jnp.asarray(limits),
        done=jnp.zeros((batch,), bool),
        progress=zeros(),
        stats=Stats(zeros(), zeros(drafts), zeros(drafts)),
        logprobs=jnp.zeros((batch, cells)) if logprobs else None,
    )


def _run(
    decoder: Decoder, text: Text, rules: Rules, width: int, ticks: int, chunk: int | None,
    writers: list[Detokenizer] | None,
):  # fmt: skip
    if decoder.mesh is not None:  # where the ticks leave them, or the second piece compiles again
        everywhere = NamedSharding(decoder.mesh, PartitionSpec())
        text, rules = jax.tree.map(lambda x: put(x, everywhere), (text, rules))
    prompt_lengths = seen = np.asarray(text.length)
    stops = set(np.asarray(rules.stop_tokens).tolist())
    whole = [""] * len(seen)
    counters = decoder.functions.counters
    state = start(
        decoder.functions, decoder.variables, text.tokens, text.length, width, chunk,
    )  # fmt: skip
    finished = False
    while not finished:
        began = time.perf_counter()
        state, text = advance(decoder.functions, decoder.variables, state, text, rules, ticks)
        counts = (counters(state), text.stats) if counters and decoder.policy else ()
        ids, length, done, counts = jax.device_get((text.tokens, text.length, text.done, counts))
        if decoder.policy is not None:
            decoder = _adapted(decoder, *counts, seconds=time.perf_counter() - began)
        new = [ids[i, seen[i] : length[i]] for i in range(len(seen))]
        pieces = None
        if writers is not None:
            pieces = _write(writers, new, done, stops)
            whole = [text_so_far + piece for text_so_far, piece in zip(whole, pieces)]
        seen, finished = length, bool(done.all())
        yield TextPiece(new, pieces)
    final = jax.device_get(text)
    spans = list(zip(range(len(seen)), prompt_lengths, final.length, strict=True))
    return Generation(
        tokens=[final.tokens[i, a:b] for i, a, b in spans],
        text=whole if writers is not None else None,
        logprobs=None if final.logprobs is None else [final.logprobs[i, a:b] for i, a, b in spans],
        finish=[
            "stop string" if final.progress[i] == HIT
            else "stop token" if int(final.tokens[i, b - 1]) in stops
            else "length"
            for i, _, b in spans
        ],
        stats=final.stats,
        counters=counters and jax.device_get(counters(state)),
        decoder=decoder,
    )  # fmt: skip


def _adapted(decoder: Decoder, *counts: Any, seconds: float) -> Decoder:
    """The decoder with what its policy makes of a piece."""
    assert decoder.policy is not None
    if jax.process_count() > 1:  # all must decide alike, though their clocks differ
        seconds = float(multihost_utils.broadcast_one_to_all(np.float32(seconds)))
    policy = decoder.policy
    learned, variables = policy.step(policy.state, decoder.variables, *counts, seconds)
    return decoder._replace(variables=variables, policy=policy._replace(state=learned))


def _write(
    writers: list[Detokenizer], new: list[np.ndarray], done: np.ndarray, stops: set[int]
) -> list[str]:
    """The text of each request's new tokens; of the token that ended it nothing is read."""
    pieces = []
    for writer, tokens, last in zip(writers, new, done, strict=True):
        shown = tokens[:-1] if last and len(tokens) and int(tokens[-1]) in stops else tokens
        pieces.append(writer.add(shown.tolist(), last=bool(last)) if len(tokens) else "")
    return pieces


@functools.partial(jax.jit, static_argnames=("functions", "width", "chunk"))
def start(functions: DecoderFunctions, variables, tokens, length, width: int, chunk: int | None):
    """The state after the prompts, which lie in the first `width` of the texts' tokens."""
    return functions.start(variables, tokens[:, :width], length, tokens.shape[1], chunk)


@functools.partial(jax.jit, static_argnames="functions", donate_argnames=("state", "text"))
def advance(functions: DecoderFunctions, variables, state, text: Text, rules: Rules, ticks):
    """Up to `ticks` ticks, fewer if all texts are done."""

    def more(carry):
        i, _, text = carry
        return (i < ticks) & ~text.done.all()

    def step(carry):
        i, state, text = carry
        return (i + 1, *functions.tick(variables, state, text, rules))

    _, state, text = lax.while_loop(more, step, (jnp.int32(0), state, text))
    return state, text


def _bucket(length: int) -> int:
    """The next power of two, 16 or more: few shapes of prompts to compile for."""
    return max(16, 1 << int(length - 1).bit_length())


def _prompt_ids(prompts, tokenizer: Tokenizer | None, vocab_size: int) -> list[list[int]]:
    if isinstance(prompts, str):
        raise TypeError(f"prompts must be a sequence of prompts; wrap the one: [{prompts[:20]!r}].")
    if not len(prompts):
        raise ValueError("There are no prompts.")
    ids: list[list[int]] = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if tokenizer is None:
                raise ValueError(f"Prompt {i} is a string; give a tokenizer, or token ids.")
            prompt = tokenizer.encode(prompt)
        tokens = [int(token) for token in prompt]
        if not tokens:
            raise ValueError(
                f"Prompt {i} is empty; give at least one token (for text from nothing, the "
                "beginning-of-text token)."
            )
        wrong = [token for token in tokens if not 0 <= token < vocab_size]
        if wrong:
            raise ValueError(
                f"Prompt {i} has token {wrong[0]}; the model knows 0..{vocab_size - 1}."
            )
        ids.append(tokens)
    return ids


def _check_room(
    lengths: np.ndarray, limits: np.ndarray, cells: int | None, max_len: int | None
) -> int:
    longest = int(limits.argmax())
    described = (
        f"Prompt {longest} has {lengths[longest]} tokens, with {limits[longest] - lengths[longest]}"
        f" new ones {limits[longest]}"
    )
    if max_len is not None and limits[longest] > max_len:
        raise ValueError(f"{described}; the model has positions for {max_len}.")
    if cells is None:
        return -(-int(limits[longest]) // 128) * 128
    if limits[longest] > cells:
        raise ValueError(f"{described}; the cache holds {cells}. Give more cells.")
    return cells


def _per_request(name: str, value, batch: int, dtype, *, at_least, at_most=None) -> np.ndarray:
    values = np.asarray(value)
    if values.ndim > 1 or (values.ndim == 1 and len(values) != batch):
        raise ValueError(f"{name} has shape {values.shape}; give one value, or {batch}.")
    # Written so that nan is wrong, too.
    good = (values >= at_least) & (values <= (np.inf if at_most is None else at_most))
    if not good.all():
        limit = f"at least {at_least}" if at_most is None else f"from {at_least} to {at_most}"
        raise ValueError(f"{name} must be {limit}, got {np.atleast_1d(values[~good])[0]}.")
    return np.broadcast_to(values, (batch,)).astype(dtype)


def _sampling(batch: int, temperature, top_k, top_p, min_p, key: Key | None) -> Sampling:
    heat = _per_request("temperature", temperature, batch, np.float32, at_least=0)
    if not np.isfinite(heat).all():
        raise ValueError(f"temperature must be finite, got {heat.max()}.")
    optional = lambda name, value, dtype, **limits: (
        None if value is None else jnp.asarray(_per_request(name, value, batch, dtype, **limits))
    )
    k = optional("top_k", top_k, np.int32, at_least=0)
    p = optional("top_p", top_p, np.float32, at_least=0, at_most=1)
    if p is not None and not (p > 0).all():
        raise ValueError("top_p must be above 0 (and at most 1), got 0.")
    least = optional("min_p", min_p, np.float32, at_least=0, at_most=1)
    request = jnp.arange(batch, dtype=jnp.int32)
    if not heat.any():
        return Sampling(jax.random.key(0), request)
    if key is None:
        raise ValueError("A temperature above 0 draws random numbers; give a key.")
    return Sampling(key, request, jnp.asarray(heat), k, p, least)


def _vocabulary_difference(tokenizer: Tokenizer, draft: Tokenizer) -> str:
    ours, theirs = tokenizer.vocab, draft.vocab
    either = sorted(ours.keys() | theirs.keys())
    token = next(token for token in either if ours.get(token) != theirs.get(token))
    return (
        f"The vocabularies of target and draft differ: token {token!r} has id {ours.get(token)} in "
        f"the target's ({len(ours)} tokens) and {theirs.get(token)} in the draft's "
        f"({len(theirs)} tokens). A draft needs its target's tokenizer."
    )
