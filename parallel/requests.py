"""From what a caller asks of `generate` to the arrays that decoders read; mistakes raise here."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.model import Array, Key
from jaxfm.parallel.cache import Positions
from jaxfm.parallel.decode import Decoder
from jaxfm.parallel.grammar import Grammar
from jaxfm.parallel.penalties import Penalties
from jaxfm.parallel.sampling import Sampling
from jaxfm.parallel.stop import automaton
from jaxfm.parallel.verification import Rules, Stats, Text, Top
from jaxfm.tokenizer import Tokenizer, same_vocabulary, token_ids, utf8

_MOST = 2**30  # of whole numbers, so that their sums are int32
# All tokens are equally likely here; the reciprocal of a higher temperature is 0, where numbers too
# small are taken for it, and 0 times the -inf of a token that was removed is NaN.
_HOTTEST = np.float32(1e30)


def prompt_ids(prompts, tokenizer: Tokenizer | None, vocab_size: int) -> list[list[int]]:
    """The token ids of each prompt.

    Args:
      prompts: strings or sequences of ids; or what a tokenizer of `transformers` returns for a
        batch: a mapping of "input_ids" and, for padded rows, "attention_mask".
      tokenizer: needed for strings.
      vocab_size: ids are below this.
    Raises:
      TypeError: one prompt instead of a sequence of them, or ids that are no whole numbers.
      ValueError: no prompts, an empty one, a string without a tokenizer, or an unknown token.
    """
    if isinstance(prompts, str):
        raise TypeError(f"prompts must be a sequence of prompts; wrap the one: [{prompts[:20]!r}].")
    if isinstance(prompts, Mapping):
        prompts = _unpadded(prompts)
    if not hasattr(prompts, "__len__"):
        raise TypeError(f"prompts must be a sequence of prompts, got {prompts!r}.")
    if not len(prompts):
        raise ValueError("There are no prompts; give at least one.")
    ids: list[list[int]] = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if tokenizer is None:
                raise ValueError(f"Prompt {i} is a string; give a tokenizer, or token ids.")
            prompt = tokenizer.encode(prompt)
        tokens = token_ids(prompt, f"The tokens of prompt {i}", vocab_size)
        if not tokens:
            raise ValueError(
                f"Prompt {i} is empty; give at least one token (for text from nothing, the "
                "beginning-of-text token)."
            )
        ids.append(tokens)
    return ids


def _unpadded(batch: Mapping) -> list:
    """The rows of a tokenizer's output, without the places that its mask says are padding."""
    if "input_ids" not in batch:
        raise TypeError(
            f"prompts is a mapping of {sorted(map(str, batch))}; give a sequence of prompts, or a "
            "tokenizer's output, which has 'input_ids'."
        )
    rows = list(batch["input_ids"])
    if rows and np.ndim(rows[0]) == 0:
        raise TypeError("'input_ids' is one prompt; give a sequence of prompts.")
    masks = batch.get("attention_mask")
    if masks is None:
        return rows
    shapes = [list(map(len, part)) for part in (rows, masks)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"'input_ids' and 'attention_mask' have rows of {shapes} places.")
    return [np.asarray(row)[np.asarray(mask).astype(bool)] for row, mask in zip(rows, masks)]


def listed_stops(stop_tokens, stop_strings, vocab_size: int) -> tuple[list[int], list[str]]:
    """Stop tokens and stop strings as lists; each may be given as one, several or None.

    Raises:
      TypeError: a stop token that is no whole number, or a stop string that is none.
      ValueError: a stop token outside the vocabulary.
    """
    one = stop_tokens is not None and np.ndim(stop_tokens) == 0
    tokens = [] if stop_tokens is None else [stop_tokens] if one else stop_tokens
    strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or ())
    for string in strings:
        utf8(string)
    return token_ids(tokens, "Stop tokens", vocab_size), strings


def check_tokenizers(
    tokenizer: Tokenizer | None, draft: Tokenizer | None, stop_strings: Sequence[str]
) -> None:
    """Raises ValueError if a tokenizer is needed but missing, or the draft's vocabulary differs."""
    if draft is not None:
        if tokenizer is None:
            raise ValueError("draft_tokenizer is given without tokenizer; give both to compare.")
        if not same_vocabulary(tokenizer, draft):
            raise ValueError(_vocabulary_difference(tokenizer, draft))
    if stop_strings and tokenizer is None:
        raise ValueError("stop_strings need a tokenizer, to know the text of each token.")


def _vocabulary_difference(tokenizer: Tokenizer, draft: Tokenizer) -> str:
    ours, theirs = tokenizer.vocab, draft.vocab
    either = sorted(ours.keys() | theirs.keys())
    token = next(token for token in either if ours.get(token) != theirs.get(token))
    return (
        f"The vocabularies of target and draft differ: token {token!r} has id {ours.get(token)} in "
        f"the target's ({len(ours)} tokens) and {theirs.get(token)} in the draft's "
        f"({len(theirs)} tokens). A draft needs its target's tokenizer."
    )


def check_room(
    lengths: np.ndarray, limits: np.ndarray, cells: int | None, positions: Positions
) -> int:
    """The number of cells that the cache needs for each text.

    Args:
      lengths: i32[B] of the prompts.
      limits: i32[B] of the whole texts.
      cells: what the caller wants; None: just enough, in steps of 128.
      positions: of the model. The last token of a text needs none, since it is not read.
    Raises:
      ValueError: a text is longer than the model's positions or the wanted cache.
    """
    longest = int(limits.argmax())
    described = (
        f"Prompt {longest} has {lengths[longest]} tokens, with {limits[longest] - lengths[longest]}"
        f" new ones {limits[longest]}"
    )
    if positions.number is not None and limits[longest] > positions.number + 1:
        if positions.learned:
            raise ValueError(
                f"{described}; the model has positions for {positions.number}, and one token more."
            )
        warnings.warn(
            f"{described}; the model was made for {positions.number}. It may fail beyond.",
            stacklevel=4,
        )
    if cells is None:
        return -(-int(limits[longest]) // 128) * 128
    if limits[longest] > cells:
        raise ValueError(f"{described}; the cache holds {cells}. Give more cells.")
    return cells


def per_request(name: str, value, batch: int, dtype, *, at_least, at_most=None) -> np.ndarray:
    """[B] of `dtype`: one value for all requests repeated, or one for each.

    Raises:
      TypeError: a value is no number, or no whole one where `dtype` is of whole numbers.
      ValueError: another number of values, or one outside of the bounds; the message has `name`.
    """
    values = np.asarray(value)
    whole = np.issubdtype(dtype, np.integer)
    if values.dtype.kind not in ("iu" if whole else "iuf"):
        raise TypeError(f"{name} must be {'whole ' if whole else ''}numbers, got {value!r}.")
    if values.ndim > 1 or (values.ndim == 1 and len(values) != batch):
        raise ValueError(f"{name} has shape {values.shape}; give one value, or {batch}.")
    most = at_most if at_most is not None else _MOST if whole else np.inf
    # Written so that nan is wrong, too.
    good = (values >= at_least) & (values <= most)
    if not good.all():
        wrong = np.atleast_1d(values[~good])[0]
        open_ended = at_most is None and not wrong > most
        limit = f"at least {at_least}" if open_ended else f"from {at_least} to {most}"
        raise ValueError(f"{name} must be {limit}, got {wrong}.")
    return np.broadcast_to(values, (batch,)).astype(dtype)


def whole_number(name: str, value, *, at_least: int = 1) -> int:
    """The value as an int; raises TypeError or ValueError, with `name`, where it is none."""
    return int(per_request(name, value, 1, np.int32, at_least=at_least)[0])


def make_sampling(
    batch: int, temperature, top_k, top_p, min_p, key: Key | None, *,
    known: np.ndarray | None = None, bias: Array | None = None,
    penalties: Penalties | None = None, grammar: Grammar | None = None, seeds=None,
) -> Sampling:  # fmt: skip
    """How each request draws its tokens; greedy without a temperature above 0.

    Args:
      batch: number of requests.
      temperature, top_k, top_p, min_p: one for all or each.
      key: typed key; None where all are greedy.
      known: bool[V], which rows of the model are tokens; None: all.
      bias: f32[B, V] of `make_bias`, or None.
      penalties: of `make_penalties`, or None.
      grammar: of `make_grammar`, or None.
      seeds: number of each request's random draws, one for all or each; None: its place.
    Raises:
      ValueError: a setting out of range, or a temperature without a key.
    """
    heat = per_request("temperature", temperature, batch, np.float32, at_least=0)
    heat = np.where(heat < np.finfo(np.float32).tiny, np.float32(0), heat)
    if not np.isfinite(heat).all():
        raise ValueError(f"temperature must be finite, got {heat.max()}.")
    heat = np.minimum(heat, _HOTTEST)
    optional = lambda name, value, dtype, **limits: (
        None if value is None else jnp.asarray(per_request(name, value, batch, dtype, **limits))
    )
    k = optional("top_k", top_k, np.int32, at_least=0)
    p = optional("top_p", top_p, np.float32, at_least=0, at_most=1)
    if p is not None and not (p > 0).all():
        raise ValueError("top_p must be above 0 (and at most 1), got 0.")
    least = optional("min_p", min_p, np.float32, at_least=0, at_most=1)
    request = jnp.arange(batch, dtype=jnp.int32)
    if seeds is not None:
        request = jnp.asarray(per_request("seeds", seeds, batch, np.int32, at_least=0))
    rows = None if known is None else jnp.asarray(known)
    greedy = Sampling(
        jax.random.key(0), request, known=rows, bias=bias, penalties=penalties, grammar=grammar
    )
    if not heat.any():
        return greedy
    return greedy._replace(
        key=_one_key(key), temperature=jnp.asarray(heat), top_k=k, top_p=p, min_p=least
    )


def make_bias(
    logit_bias, batch: int, vocab_size: int, known: np.ndarray | None = None
) -> Array | None:
    """f32[B, V], what is added to the logits of each request; None where nothing is.

    Args:
      logit_bias: a mapping from tokens to numbers for all requests, or one for each; None: none.
      batch: number of requests.
      vocab_size: tokens are below this.
      known: bool[V], which rows of the model are tokens; None: all.
    Raises:
      TypeError: something else than mappings, or tokens that are no whole numbers.
      ValueError: another number of mappings, an unknown token, a bias that is nan or inf, or no
        token is left to choose.
    """
    if not logit_bias:
        return None
    each = [logit_bias] * batch if isinstance(logit_bias, Mapping) else list(logit_bias)
    if not all(isinstance(one, Mapping) for one in each):
        raise TypeError(f"logit_bias must be a mapping of tokens, or several; got {logit_bias!r}.")
    if len(each) != batch:
        raise ValueError(f"logit_bias has {len(each)} mappings; give one, or {batch}.")
    bias = np.zeros((batch, vocab_size), np.float32)
    for row, one in zip(bias, each, strict=True):
        row[token_ids(list(one), "The tokens of logit_bias", vocab_size)] = list(one.values())
    if not (bias < np.inf).all():
        raise ValueError("A bias of logit_bias is nan or inf; give a number, or -inf for never.")
    left = bias > -np.inf if known is None else (bias > -np.inf) & known
    if not left.any(1).all():
        raise ValueError(
            f"logit_bias is -inf for every token of text {np.flatnonzero(~left.any(1))[0]}; leave "
            "one at least."
        )
    return jnp.asarray(bias)


def make_penalties(lengths: np.ndarray, repetition, presence, frequency) -> Penalties | None:
    """The penalties of each request, one for all or each; None where all are off.

    Args:
      lengths: i32[B] of the prompts.
      repetition: from 0.01 to 100; 1 or None is off.
      presence, frequency: from -2 to 2; 0 or None is off.
    Raises:
      TypeError, ValueError: as `per_request`, with the name of the setting.
    """

    def optional(name: str, value, off: float, least: float, most: float) -> Array | None:
        if value is None:
            return None
        name = f"{name}_penalty"
        each = per_request(name, value, len(lengths), np.float32, at_least=least, at_most=most)
        return None if (each == off).all() else jnp.asarray(each)

    penalties = Penalties(
        begin=jnp.asarray(lengths),
        repetition=optional("repetition", repetition, 1, 0.01, 100),
        presence=optional("presence", presence, 0, -2, 2),
        frequency=optional("frequency", frequency, 0, -2, 2),
    )
    return None if all(penalty is None for penalty in penalties[1:]) else penalties


def _one_key(key) -> Key:
    """The key; raises TypeError or ValueError where this is not one typed key."""
    if key is None:
        raise ValueError("A temperature above 0 draws random numbers; give a key.")
    kind = getattr(key, "dtype", None)
    if kind is None or not jnp.issubdtype(kind, jax.dtypes.prng_key):
        given = "a key of the older kind, uint32 numbers" if kind == np.uint32 else repr(key)
        raise TypeError(f"key must be a typed key, as jax.random.key(0) gives one; got {given}.")
    if key.shape:
        raise ValueError(f"key has shape {key.shape}; give one key for all requests.")
    return key


def known_rows(tokenizer: Tokenizer | None, rows: int) -> np.ndarray | None:
    """bool[V], which of a model's rows are tokens of its tokenizer; None: all."""
    if tokenizer is None:
        return None
    known = np.zeros(rows, bool)
    known[[token for token in tokenizer.vocab.values() if token < rows]] = True
    return None if known.all() else known


def top_count(value, decoder: Decoder) -> int:
    """How many likely tokens are kept at each place.

    Raises:
      TypeError: the value is no whole number.
      ValueError: it is not from 0 to the vocabulary's size, or the decoder keeps none.
    """
    most = decoder.vocab_size
    count = int(per_request("top_logprobs", value, 1, np.int32, at_least=0, at_most=most)[0])
    if count and not decoder.functions.whole_model:
        raise ValueError(
            "A pipe keeps no top_logprobs, since its stages tell each other the chosen tokens "
            "only; use plain, lookup or speculative."
        )
    return count


def make_rules(
    sampling: Sampling, stop_tokens: Sequence[int], stop_strings: Sequence[str],
    token_bytes: list[bytes], vocab_size: int,
) -> Rules:  # fmt: skip
    """How tokens are chosen and where texts end."""
    table = jnp.asarray(automaton(stop_strings, token_bytes[:vocab_size])) if stop_strings else None
    return Rules(sampling, jnp.asarray(np.array(stop_tokens, np.int32)), table)


def make_text(
    ids: list[list[int]], limits: np.ndarray, cells: int, *, drafts: int, logprobs: bool, top: int,
    states: Array | None = None,
) -> Text:  # fmt: skip
    """The prompts as texts that may grow up to `limits`; `top` likely tokens are kept of each."""
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
        failed=jnp.zeros((batch,), bool),
        logprobs=jnp.zeros((batch, cells)) if logprobs else None,
        top=Top(zeros(cells, top), jnp.zeros((batch, cells, top))) if top else None,
        states=states,
    )


def bucket(length: int) -> int:
    """The next power of two, at least 16: so there are few shapes of prompts to compile for."""
    return max(16, 1 << int(length - 1).bit_length())
