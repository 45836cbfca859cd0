"""A byte-level BPE whose merges are learnt from sums of the clients' pair counts.

Each round every client counts the pairs of neighboring tokens in its own words; the server sees the
sum s over clients alone, takes the largest pairs as merges, and tells all clients. Without noise
and with one merge a round the result is the BPE of all texts together. With noise z,

    text or site u:  v_u = floor(p_u min(1, C / |p_u|)),     p_u its pair counts
    client:          c_i = min(sum of its v_u, L),           by pairs
    server:          s   = sum of c_i + N(0, (z C)^2)        for every pair of the vocabulary

a text (or a whole site) moves the sum by C at most, as capping by coordinates is a contraction, so
the tokenizer is private with the epsilon of R Gaussian mechanisms of multiplier z. Noise goes to
all pairs, also to those that nobody has, so which pairs occur is private too. A merge needs

    s > (k - 1) L + t z C,

and since a pair that fewer than k sites have sums to (k - 1) L at most, the probability that any
such pair enters in the whole run is bounded by `failure`, which sets t. All counts are integers, so
that a secure sum can stand in the place of `total`; noise is then added to what it opens.
Floats of 64 bits carry the noise: attacks on their lowest bits (Mironov 2012) are out of scope.
Sources: Sennrich et al. 2016 (BPE); Dong et
al. 2022 (Gaussian mechanisms compose); the cap and its threshold are our own.
"""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from jaxfm.federated.accounting.epsilon import Sampling, epsilon_of
from jaxfm.tokenizer import HuggingFaceTokenizer, bpe_alphabet, bpe_of_merges, bpe_words

Total = Callable[[Sequence[np.ndarray]], np.ndarray]
Words = dict[tuple[int, ...], int]


class Noise(NamedTuple):
    """How a vocabulary is made private.

    Attributes:
      multiplier: z.
      clip: C, the largest norm of what a text or a site adds to the counts of a round.
      cap: L, the most that a site adds to the count of one pair.
      protects: what epsilon is of: one "text" of a site, or a whole "site".
      delta: of epsilon.
      failure: the probability that any pair of fewer than k sites enters.
    """

    multiplier: float
    clip: float = 32.0
    cap: int = 64
    protects: Literal["text", "site"] = "text"
    delta: float = 1e-5
    failure: float = 1e-3


class Vocabulary(NamedTuple):
    """A tokenizer, and what it cost.

    Attributes:
      tokenizer: the BPE.
      merges: pairs of tokens, in order.
      rounds: sums that were opened.
      epsilon: of the whole tokenizer, at `Noise.delta`; infinite without noise.
    """

    tokenizer: HuggingFaceTokenizer
    merges: list[tuple[str, str]]
    rounds: int
    epsilon: float


def plain_total(counts: Sequence[np.ndarray]) -> np.ndarray:
    """i64[...]: the sum of the clients' counts, without secrecy."""
    return np.asarray(np.sum(counts, axis=0, dtype=np.int64))


def federated_bpe(
    sites: Sequence[Sequence[str]],
    vocab_size: int,
    *,
    least_sites: int = 1,
    merges_per_round: int = 1,
    noise: Noise | None = None,
    seed: int | None = None,
    total: Total = plain_total,
) -> Vocabulary:
    """Learns one tokenizer for all sites; no text leaves its site.

    Args:
      sites: the texts of each; a site may have none.
      vocab_size: largest number of ids: 4 special ones, 256 bytes, then merges.
      least_sites: k, how many sites must have a pair that is merged. Without noise they tell in a
        second sum which pairs they have; with noise the cap sees to it.
      merges_per_round: merges that share no token are taken from one sum; more cost less privacy.
      noise: None: exact sums.
      seed: of the noise, for tests; None: drawn afresh, as privacy needs.
      total: adds i64[P] counts of the clients, for example by a secure sum.
    Raises:
      ValueError: no site, a size below 260, or settings out of range.
    """
    check(sites, vocab_size, least_sites, merges_per_round, noise)
    tokens = bpe_alphabet()
    ids = {token: number for number, token in enumerate(tokens)}
    whole = noise is None or noise.protects == "site"
    clients = [_units(texts, ids, whole) for texts in sites]
    most = vocab_size - len(tokens)
    planned = math.ceil(most / merges_per_round)
    rng = np.random.default_rng(seed)
    merges: list[tuple[int, int]] = []
    rounds, epsilon = 0, math.inf
    while len(tokens) < vocab_size and rounds < planned + (most if noise is None else 0):
        size = len(tokens)
        sums = total([client_counts(units, size, noise) for units in clients])
        allowed = sums > 0
        if noise is None and least_sites > 1:
            held = [(client_counts(units, size, None) > 0).astype(np.int64) for units in clients]
            allowed = total(held) >= least_sites
        if noise is not None:
            deviation = noise.multiplier * noise.clip
            sums = sums + rng.normal(0, deviation, sums.shape)
            allowed = sums > threshold(noise, least_sites, size, planned)
        rounds += 1
        best = best_pairs(sums, allowed, size, min(merges_per_round, vocab_size - size))
        for left, right in best:
            joined = tokens[left] + tokens[right]
            if joined not in ids:
                ids[joined] = len(tokens)
                tokens.append(joined)
            for units in clients:
                units[:] = [_merged(words, left, right, ids[joined]) for words in units]
        merges += best
        if not best:
            break
    if noise is not None:
        everybody = Sampling(len(sites), len(sites))
        epsilon = epsilon_of(noise.multiplier, planned, noise.delta, everybody)
    spelled = [(tokens[left], tokens[right]) for left, right in merges]
    return Vocabulary(bpe_of_merges(spelled), spelled, rounds, epsilon)


def client_counts(units: Sequence[Words], size: int, noise: Noise | None) -> np.ndarray:
    """i64[size * size]: what one client adds to the sum, pair (a, b) at a * size + b."""
    counts = np.zeros(size * size, np.int64)
    for words in units:
        pairs: collections.Counter[int] = collections.Counter()
        for word, number in words.items():
            for left, right in itertools.pairwise(word):
                pairs[left * size + right] += number
        if not pairs:
            continue
        places = np.fromiter(pairs.keys(), np.int64, len(pairs))
        values = np.fromiter(pairs.values(), np.int64, len(pairs))
        if noise is not None:
            norm = float(np.linalg.norm(values))
            values = np.floor(values * min(1.0, noise.clip / norm)).astype(np.int64)
        counts[places] += values
    return counts if noise is None else np.minimum(counts, noise.cap)


def threshold(noise: Noise, least_sites: int, size: int, rounds: int) -> float:
    """What a noisy sum of `size` ** 2 pairs must exceed, (k - 1) L + t z C."""
    from scipy.stats import norm

    t = float(norm.isf(noise.failure / (rounds * size * size)))
    return (least_sites - 1) * noise.cap + t * noise.multiplier * noise.clip


def best_pairs(
    sums: np.ndarray, allowed: np.ndarray, size: int, number: int
) -> list[tuple[int, int]]:
    """The pairs of the largest sums, smallest ids first among equals, no two with a common token.

    Args:
      sums: [size * size].
      allowed: bool[size * size], which may be taken.
      size: tokens so far.
      number: how many at most.
    """
    if number == 1:
        values = np.where(allowed, sums, -np.inf)
        place = int(np.argmax(values))
        return [divmod(place, size)] if allowed[place] else []
    places = np.flatnonzero(allowed)
    places = places[np.argsort(-sums[places], kind="stable")]
    taken: set[int] = set()
    found: list[tuple[int, int]] = []
    for place in places.tolist():
        left, right = divmod(place, size)
        if len(found) < number and not {left, right} & taken:
            found.append((left, right))
            taken |= {left, right}
    return found


def _units(texts: Sequence[str], ids: Mapping[str, int], whole: bool) -> list[Words]:
    """The words of each text, or of all of them, as token ids with how often they occur."""
    counters = [collections.Counter(bpe_words(text)) for text in texts]
    if whole:
        counters = [sum(counters, collections.Counter())]
    return [
        {tuple(ids[character] for character in word): n for word, n in counter.items()}
        for counter in counters
    ]


def _merged(words: Words, left: int, right: int, new: int) -> Words:
    """The words with a pair joined, from the left."""
    changed: Words = {}
    for word, number in words.items():
        if left in word and right in word:
            parts, at = [], 0
            while at < len(word):
                here = word[at : at + 2] == (left, right)
                parts.append(new if here else word[at])
                at += 2 if here else 1
            word = tuple(parts)
        changed[word] = changed.get(word, 0) + number
    return changed


def check(
    sites: Sequence[Sequence[str]],
    vocab_size: int,
    least_sites: int,
    merges_per_round: int,
    noise: Noise | None,
) -> None:
    """Raises ValueError for arguments of `federated_bpe` that are out of range."""
    if not sites:
        raise ValueError("There is no site; give the texts of at least one.")
    if isinstance(sites, str) or any(isinstance(texts, str) for texts in sites):
        raise ValueError("A site is a list of texts, not one text; put it in a list.")
    if vocab_size < 260:
        raise ValueError(f"vocab_size must be at least 260; got {vocab_size}.")
    if not 1 <= least_sites <= len(sites):
        raise ValueError(
            f"least_sites={least_sites} must be between 1 and the number of sites, {len(sites)}."
        )
    if merges_per_round < 1:
        raise ValueError(f"merges_per_round must be at least 1; got {merges_per_round}.")
    if noise is None:
        return
    if noise.protects not in ("text", "site"):
        raise ValueError(f"Noise protects a 'text' or a 'site', not {noise.protects!r}.")
    positive = noise.multiplier > 0 and noise.clip > 0 and noise.cap >= 1
    if not (positive and math.isfinite(noise.multiplier) and math.isfinite(noise.clip)):
        raise ValueError(f"multiplier, clip and cap must be positive and finite; got {noise}.")
    if not (0 < noise.delta < 1 and 0 < noise.failure < 1):
        raise ValueError(f"delta and failure must be between 0 and 1; got {noise}.")
