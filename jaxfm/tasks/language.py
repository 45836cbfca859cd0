"""Language modelling: the next token, or the masked ones."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.tasks.task import Array, Ratio, Task, count_correct, leaf, row_weight, weighted_sum


def causal_lm(bytes_per_token: np.ndarray | None = None, pad_id: int | None = None) -> Task:
    """Predicts each token from those before it.

    Batch: "tokens" i32[B, T + 1]; inputs are the first T, targets the last T. Outputs: logits
    [B, T, V] of any float type. Metrics: "loss" in nats per token, "accuracy", and, given
    `bytes_per_token`, "bits_per_byte": bits spent on all targets, separators included, over bytes
    of text in them, comparable between tokenizers.

    Args:
      bytes_per_token: i32[V], from `jaxfm.tokenizer.bytes_per_token`.
      pad_id: targets with this id have weight 0.
    """

    def prepare(batch, key=None):
        tokens = leaf(batch, "tokens")
        targets = tokens[:, 1:]
        weight = row_weight(batch, targets)
        if pad_id is not None:
            weight = jnp.where(targets == pad_id, 0.0, weight)
        return tokens[:, :-1], targets, weight

    def metrics(outputs, targets, weight):
        nats, count = cross_entropy(outputs, targets, weight)
        result = {"loss": (nats, count), "accuracy": count_correct(outputs, targets, weight)}
        if bytes_per_token is not None:
            num_bytes = jnp.asarray(bytes_per_token, jnp.float32)[targets]
            result["bits_per_byte"] = (nats / np.log(2), weighted_sum(num_bytes, weight))
        return result

    return Task(prepare, cross_entropy, metrics)


def completion(pad_id: int | None = None, prompt_weight: float = 0.0) -> Task:
    """Predicts the tokens of an answer from a prompt before it and those of the answer so far.

    Batch: "tokens" i32[B, T + 1], prompt and answer; "begin" i32[B], the place of the answer's
    first token, at least 1. Outputs: logits [B, T, V]. Metrics: "loss" in nats per token of
    answers, "accuracy" of such tokens, and "exact_match", the share of answers whose tokens are all
    right, each given those before it: what greedy decoding writes.

    Args:
      pad_id: targets with this id have weight 0.
      prompt_weight: of the prompt's own tokens in the loss; metrics never count them.
    Raises:
      ValueError: a negative weight.
    """
    if not prompt_weight >= 0:
        raise ValueError(f"prompt_weight must be 0 or more, got {prompt_weight}.")

    def prepare(batch, key=None):
        tokens = leaf(batch, "tokens")
        targets = tokens[:, 1:]
        places = jnp.arange(1, tokens.shape[1], dtype=jnp.int32)[None]
        real = row_weight(batch, targets)
        if pad_id is not None:
            real = jnp.where(targets == pad_id, 0.0, real)
        answer = places >= leaf(batch, "begin")[:, None]
        return tokens[:, :-1], (targets, answer), real

    def weighted(targets, weight):
        targets, answer = targets
        return targets, jnp.where(answer, weight, prompt_weight * weight)

    def loss(outputs, targets, weight):
        return cross_entropy(outputs, *weighted(targets, weight))

    def metrics(outputs, targets, weight):
        targets, answer = targets
        weight = jnp.where(answer, weight, 0.0)
        wrong = (outputs.argmax(-1) != targets) & (weight > 0)
        rows = weight.max(-1)
        return {
            "loss": cross_entropy(outputs, targets, weight),
            "accuracy": count_correct(outputs, targets, weight),
            "exact_match": (weighted_sum(~wrong.any(-1), rows), jnp.sum(rows)),
        }

    return Task(prepare, loss, metrics)


def masked_lm(
    mask_id: int,
    vocab_size: int,
    special_ids: Iterable[int] = (),
    rate: float = 0.15,
    pad_id: int | None = None,
) -> Task:
    """Recovers tokens that were hidden.

    Of the tokens that are not special each is chosen with probability `rate`; a chosen one is
    replaced by `mask_id` (80%), by a random ordinary token (10%) or left as it is (10%). Batch:
    "tokens" i32[B, T], all of them inputs. Only chosen positions have weight. Outputs: logits
    [B, T, V]. Metrics: "loss" in nats per chosen token, "accuracy". A key is always needed.

    Args:
      mask_id, vocab_size, special_ids, rate: as said.
      pad_id: of tokens that only fill up a row; inputs are then a dict of "tokens" and the "mask"
        of those that do not, as encoders read it.
    Raises:
      ValueError: an id outside the vocabulary, a rate outside (0, 1).

    Source: Devlin et al. 2019, "BERT", section 3.1.
    """
    special = {int(token) for token in special_ids} | {int(mask_id)}
    if wrong := sorted(token for token in special if not 0 <= token < vocab_size):
        raise ValueError(f"mask_id and special_ids must be in 0..{vocab_size - 1}; got {wrong}.")
    if not 0 < rate < 1:
        raise ValueError(f"rate must be between 0 and 1; got {rate}.")
    ordinary = np.array(sorted(set(range(vocab_size)) - special), np.int32)
    if not ordinary.size:
        raise ValueError("Every id of the vocabulary is special; there is nothing to predict.")

    def prepare(batch, key=None):
        if key is None:
            raise ValueError(
                "masked_lm chooses tokens at random: give prepare (or evaluate) a key."
            )
        tokens = leaf(batch, "tokens")
        choose_key, how_key, random_key = jax.random.split(key, 3)
        eligible = jnp.isin(tokens, np.array(sorted(special), np.int32), invert=True)
        chosen = eligible & (jax.random.uniform(choose_key, tokens.shape) < rate)
        how = jax.random.uniform(how_key, tokens.shape)
        random = jax.random.choice(random_key, ordinary, tokens.shape).astype(tokens.dtype)
        hidden = jnp.where(how < 0.8, mask_id, jnp.where(how < 0.9, random, tokens))
        inputs: Any = jnp.where(chosen, hidden, tokens)
        if pad_id is not None:
            inputs = {"tokens": inputs, "mask": tokens != pad_id}
        return inputs, tokens, jnp.where(chosen, row_weight(batch, tokens), 0.0)

    def metrics(outputs, targets, weight):
        return {
            "loss": cross_entropy(outputs, targets, weight),
            "accuracy": count_correct(outputs, targets, weight),
        }

    return Task(prepare, cross_entropy, metrics, draws=True)


def cross_entropy(logits: Array, targets: Array, weight: Array) -> Ratio:
    """Returns (weighted sum of -log softmax(logits)[target] in nats, sum of weights), in f32."""
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"Logits {logits.shape} do not fit targets {targets.shape}; one row of logits each."
        )
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return weighted_sum(jax.nn.logsumexp(logits, axis=-1) - chosen, weight), jnp.sum(weight)
