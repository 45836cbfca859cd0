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
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxfm.model import Key, PyTree
from jaxfm.parallel.cache import Prior
from jaxfm.parallel.decode import Decoder, DecoderFunctions
from jaxfm.parallel.grammar import complete
from jaxfm.parallel.grammars.automaton import Automaton
from jaxfm.parallel.grammars.request import make_grammar
from jaxfm.parallel.mesh import put
from jaxfm.parallel.prefix import Prefix, check_prefix
from jaxfm.parallel.requests import (
    bucket,
    check_room,
    check_tokenizers,
    known_rows,
    listed_stops,
    make_bias,
    make_penalties,
    make_rules,
    make_sampling,
    make_text,
    per_request,
    prompt_ids,
    top_count,
    whole_number,
)
from jaxfm.parallel.stop import HIT, Detokenizer
from jaxfm.parallel.verification import Rules, Stats, Text, Top
from jaxfm.tokenizer import Tokenizer


class TextPiece(NamedTuple):
    """What one loop of ticks added to the texts.

    Attributes:
      tokens: new ids of each request.
      text: new text of each request, which is never taken back; None without a tokenizer.
    """

    tokens: list[np.ndarray]
    text: list[str] | None


class Generation(NamedTuple):
    """What was generated, without the prompts; lists have one entry a request.

    Attributes:
      tokens: i32 ids; the last ones are the stop token, or the tokens that complete a stop string.
      text: without stop token and stop string; None without a tokenizer.
      logprobs: f32, the model's log-softmax at each token (before temperature and cuts); None
        unless asked for.
      finish: "length", "stop token", "stop string", "grammar" (it has no longer text with room), or
        "not finite": the model's logits for the next token were not.
      stats: counts as NumPy arrays.
      counters: the decoder's own counts; None where it keeps none.
      decoder: the decoder afterwards. If it has a policy, what this has measured is in it: give it
        to the next call.
      top: likely tokens i32[T, n] and their log-softmax f32[T, n]; None unless asked for.
    """

    tokens: list[np.ndarray]
    text: list[str] | None
    logprobs: list[np.ndarray] | None
    finish: list[str]
    stats: Stats
    counters: Any = None
    decoder: Decoder | None = None
    top: list[Top] | None = None


def generate(decoder: Decoder, prompts: Sequence, **settings: Any) -> Generation:
    """Continues prompts to their ends; arguments and errors are those of `stream`."""
    pieces = stream(decoder, prompts, **settings)
    while True:
        try:
            next(pieces)
        except StopIteration as stop:
            return stop.value


def stream(
    decoder: Decoder,
    prompts: Sequence[str] | Sequence[Sequence[int]] | Mapping[str, Any],
    *,
    max_new_tokens: int | Sequence[int] = 64,
    temperature: float | Sequence[float] = 0.0,
    top_k: int | Sequence[int] | None = None,
    top_p: float | Sequence[float] | None = None,
    min_p: float | Sequence[float] | None = None,
    key: Key | None = None,
    seeds: int | Sequence[int] | None = None,
    num_samples: int = 1,
    logit_bias: Mapping[int, float] | Sequence[Mapping[int, float]] | None = None,
    repetition_penalty: float | Sequence[float] | None = None,
    presence_penalty: float | Sequence[float] | None = None,
    frequency_penalty: float | Sequence[float] | None = None,
    grammar: str | Automaton | Sequence[str | Automaton | None] | None = None,
    stop_tokens: int | Sequence[int] | None = (),
    stop_strings: str | Sequence[str] | None = (),
    tokenizer: Tokenizer | None = None,
    draft_tokenizer: Tokenizer | None = None,
    logprobs: bool = False,
    top_logprobs: int = 0,
    ticks: int = 16,
    cells: int | None = None,
    prefill_chunk: int | None = None,
    prefix: Prefix | None = None,
) -> Iterator[TextPiece]:
    """Continues prompts: yields a TextPiece after every `ticks` passes, returns a Generation.

    The ticks of a piece run as one loop on the device, and all pieces of all calls with the same
    shapes (number of prompts, cells, bucket of prompt lengths, settings that are on) share one
    compiled functions.

    Args:
      decoder: of `plain`, `lookup`, `speculative`, `pipeinfer`, ...
      prompts: token ids, or strings where a tokenizer is given; lengths may differ. Or the output
        of a tokenizer of `transformers` for a batch, whose padding is left out.
      max_new_tokens: most tokens generated; one number for all requests, or one for each.
      temperature: one for all or each; 0 is greedy. See `jaxfm.parallel.sampling`.
      top_k, top_p, min_p: one for all or each; None is off.
      key: typed key, needed when a temperature is above 0.
      seeds: what each text's draws depend on beside the key; None: its place in the batch. With a
        seed of its own a text is the same in whatever batch it stands.
      num_samples: texts for each prompt, one after the other; settings may then be one for each.
      logit_bias: numbers added to the logits of some tokens, -inf for never; one mapping for all
        texts or one for each. `logprobs` do not have them.
      repetition_penalty, presence_penalty, frequency_penalty: one for all or each; None is off.
        Nor do `logprobs` have these. See `jaxfm.parallel.penalties`.
      grammar: what each text must be as a whole: a regular expression, or what `regular` makes of
        named rules; one for all texts or one for each, None for those without. It needs a
        tokenizer. Stop tokens are allowed exactly where the text is one of the grammar. See
        `jaxfm.parallel.grammar`.
      stop_tokens: a text ends with the first of these; one or several.
      stop_strings: a text ends before the first of these; one or several. They need a tokenizer.
      tokenizer: of the model.
      draft_tokenizer: of the drafting model; its vocabulary is compared with `tokenizer`'s.
      logprobs: whether to return the tokens' log-probabilities.
      top_logprobs: how many of the most likely tokens to return for each generated one; not with a
        pipe.
      ticks: passes between pieces.
      cells: tokens that the cache holds of each text; None: just enough, in steps of 128.
      prefill_chunk: tokens of the prompts read in one pass, to bound memory; None: all.
      prefix: what all prompts continue, of `read_prefix`; the results are those of the whole.
    Raises:
      TypeError: prompts, tokens or settings of another type; a key that is not typed.
      ValueError: an empty prompt, a token outside the vocabulary, a text longer than the cache or
        the model's positions, different vocabularies, a setting out of range.
    """
    num_samples = whole_number("num_samples", num_samples)
    ids = prompt_ids(prompts, tokenizer, decoder.vocab_size)
    before: tuple[int, ...] = ()
    if prefix is not None:
        check_prefix(prefix, decoder)
        before = prefix.tokens
    ids = [[*before, *prompt] for prompt in ids for _ in range(num_samples)]
    stop_tokens, stop_strings = listed_stops(stop_tokens, stop_strings, decoder.vocab_size)
    check_tokenizers(tokenizer, draft_tokenizer, stop_strings)
    ticks = whole_number("ticks", ticks)
    if prefill_chunk is not None:
        prefill_chunk = whole_number("prefill_chunk", prefill_chunk)
    if cells is not None:
        cells = whole_number("cells", cells)
    top = top_count(top_logprobs, decoder)
    batch = len(ids)
    lengths = np.array([len(prompt) for prompt in ids], np.int32)
    limits = lengths + per_request("max_new_tokens", max_new_tokens, batch, np.int32, at_least=1)
    cells = check_room(lengths, limits, cells, decoder.positions)
    known = known_rows(tokenizer, decoder.vocab_size)
    bias = make_bias(logit_bias, batch, decoder.vocab_size, known)
    penalties = make_penalties(lengths, repetition_penalty, presence_penalty, frequency_penalty)
    grammars, states = make_grammar(
        grammar, limits - lengths, tokenizer, decoder.vocab_size, stop_tokens, logit_bias
    )
    sampling = make_sampling(
        batch, temperature, top_k, top_p, min_p, key,
        known=known, bias=bias, penalties=penalties, grammar=grammars, seeds=seeds,
    )  # fmt: skip
    token_bytes = _bytes_of_rows(tokenizer, decoder.vocab_size)
    rules = make_rules(sampling, stop_tokens, stop_strings, token_bytes, decoder.vocab_size)
    text = make_text(
        ids, limits, cells, drafts=decoder.draft_length, logprobs=logprobs, top=top, states=states
    )
    writers = None if tokenizer is None else [Detokenizer(token_bytes, stop_strings) for _ in ids]
    prior = prefix and prefix.prior
    # Of a prefix the last token is read once more.
    width = min(bucket(lengths.max() - max(len(before) - 1, 0)), cells)
    begin = lambda text: start(
        decoder.functions, decoder.variables, text.tokens, text.length, width, prefill_chunk, prior
    )
    return _run(decoder, text, rules, begin, ticks, writers)


def _bytes_of_rows(tokenizer: Tokenizer | None, vocab_size: int) -> list[bytes]:
    """The bytes of every token; a model may have more rows than its tokenizer has tokens."""
    if tokenizer is None:
        return []
    token_bytes = list(tokenizer.token_bytes())
    return token_bytes + [b""] * (vocab_size - len(token_bytes))


def _run(
    decoder: Decoder, text: Text, rules: Rules, begin: Callable[[Text], Any], ticks: int,
    writers: list[Detokenizer] | None,
):  # fmt: skip
    """The pieces of checked requests, then the Generation."""
    mesh = decoder.mesh or _mesh_of(decoder.variables)
    if mesh is not None:  # where the ticks leave them, or the second piece compiles again
        everywhere = NamedSharding(mesh, PartitionSpec())
        text, rules = jax.tree.map(lambda x: put(x, everywhere), (text, rules))
    prompt_lengths = seen = np.asarray(text.length)
    stops = set(np.asarray(rules.stop_tokens).tolist())
    whole = [""] * len(seen)
    counters = decoder.functions.counters
    state = begin(text)
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
    closed = None
    if (table := rules.sampling.grammar) is not None:
        closed = np.asarray(complete(table, final.states, final.limit - final.length))
    if final.failed.any():
        warnings.warn(
            f"The logits of texts {np.flatnonzero(final.failed).tolist()} were not finite; they "
            "end before. Look for such numbers among the weights, or use a wider dtype.",
            stacklevel=2,
        )
    spans = list(zip(range(len(seen)), prompt_lengths, final.length, strict=True))
    return Generation(
        tokens=[final.tokens[i, a:b] for i, a, b in spans],
        text=whole if writers is not None else None,
        logprobs=None if final.logprobs is None else [final.logprobs[i, a:b] for i, a, b in spans],
        finish=[
            "not finite" if final.failed[i]
            else "stop string" if final.progress[i] == HIT
            else "stop token" if int(final.tokens[i, b - 1]) in stops
            else "grammar" if closed is not None and closed[i] and final.length[i] < final.limit[i]
            else "length"
            for i, _, b in spans
        ],
        stats=final.stats,
        counters=counters and jax.device_get(counters(state)),
        decoder=decoder,
        top=final.top and [Top(*(part[i, a:b] for part in final.top)) for i, a, b in spans],
    )  # fmt: skip


def _mesh_of(variables: PyTree) -> Mesh | None:
    """The mesh that variables lie on, such as those that a federated run leaves on all devices."""
    for leaf in jax.tree.leaves(variables):
        place = getattr(leaf, "sharding", None)
        mesh = place.mesh if isinstance(place, NamedSharding) else None
        if isinstance(mesh, Mesh) and mesh.size > 1:
            return mesh
    return None


def _adapted(decoder: Decoder, *counts: Any, seconds: float) -> Decoder:
    """The decoder with the settings that its policy chooses after a piece."""
    assert decoder.policy is not None
    if jax.process_count() > 1:  # all must make the same decision, though their clocks differ
        seconds = float(multihost_utils.broadcast_one_to_all(np.float32(seconds)))
    policy = decoder.policy
    state, variables = policy.step(policy.state, decoder.variables, *counts, seconds)
    return decoder._replace(variables=variables, policy=policy._replace(state=state))


def _write(
    writers: list[Detokenizer], new: list[np.ndarray], done: np.ndarray, stops: set[int]
) -> list[str]:
    """The text of each request's new tokens, without the stop token that ended it."""
    pieces = []
    for writer, tokens, last in zip(writers, new, done, strict=True):
        shown = tokens[:-1] if last and len(tokens) and int(tokens[-1]) in stops else tokens
        pieces.append(writer.add(shown.tolist(), last=bool(last)) if len(tokens) else "")
    return pieces


@functools.partial(jax.jit, static_argnames=("functions", "width", "chunk"))
def start(
    functions: DecoderFunctions, variables, tokens, length, width: int, chunk: int | None,
    prior: Prior | None = None,
):  # fmt: skip
    """The decoder's state after the prompts.

    These are in the first `width` tokens of the texts, from where those of a prior end.
    """
    if prior is None:
        return functions.start(variables, tokens[:, :width], length, tokens.shape[1], chunk)
    padded = jnp.pad(tokens, ((0, 0), (0, width)))
    new = lax.dynamic_slice_in_dim(padded, prior.first, width, axis=1)
    return functions.start(variables, new, length, tokens.shape[1], chunk, prior)


@functools.partial(jax.jit, static_argnames="functions", donate_argnames=("state", "text"))
def advance(functions: DecoderFunctions, variables, state, text: Text, rules: Rules, ticks):
    """The state and the texts after up to `ticks` ticks; fewer if all texts are done."""

    def more(carry):
        i, _, text = carry
        return (i < ticks) & ~text.done.all()

    def step(carry):
        i, state, text = carry
        return (i + 1, *functions.tick(variables, state, text, rules))

    _, state, text = lax.while_loop(more, step, (jnp.int32(0), state, text))
    return state, text
