"""DP-SGD on clients, and what attacks get out of a model and a gradient, with it and without."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfm import tasks
from jaxfm.data import digits
from jaxfm.data.federation import federate
from jaxfm.federated import (
    ExamplePrivacy,
    Local,
    Population,
    Sampling,
    compile_rounds,
    fed_avg,
    plan_privacy,
    profiles,
)
from jaxfm.federated.audit.exposure import exposure
from jaxfm.federated.audit.inversion import batch_gradient, invert_gradient, reconstruction_error
from jaxfm.federated.audit.losses import example_losses
from jaxfm.federated.audit.membership import leakage
from jaxfm.federated.audit.text_inversion import invert_text, recovered_tokens
from jaxfm.federated.parts.clipping import clipped, noised
from jaxfm.models import encoder, mlp
from jaxfm.models.families.encoder import EncoderConfig

CLIENTS, ROWS, BATCH, DELTA, CLIP = 10, 20, 8, 1e-3, 1.0
MODEL, TASK = mlp((64, 64, 10)), tasks.classification(10)
REFERENCES = 511  # canaries that nobody trained on: exposure ends at 9 bits
READER = encoder(
    EncoderConfig(
        vocab_size=256, embed_dim=32, num_layers=1, num_heads=4, mlp_dim=64, max_len=16,
        head="classify", num_classes=2,
    )
)  # fmt: skip
READING = tasks.classification(2, inputs=("tokens", "mask"))
WORDS = 6  # of a text whose gradient is inverted


class Leak(NamedTuple):
    """Of one run.

    Attributes:
      accuracy: on test rows.
      advantage: of the attack that takes rows of small loss for members.
      exposure: the mean of the clients' canaries, in bits.
    """

    accuracy: float
    advantage: float
    exposure: float


def odd(key: jax.Array, number: int) -> dict[str, np.ndarray]:
    """Canaries: images of noise with a label drawn at random."""
    images, labels = jax.random.split(key)
    shape = (number, *digits()["train"].examples["image"].shape[1:])
    return {
        "image": np.asarray(jax.random.uniform(images, shape, jnp.float32)),
        "label": np.asarray(jax.random.randint(labels, (number,), 0, 10, jnp.int32)),
    }


def example_noise(epsilon: float, rounds: int) -> float:
    """The noise multiplier of a client's steps; an infinite epsilon asks for none."""
    if math.isinf(epsilon):
        return 0.0
    steps = rounds * -(-(ROWS + 1) // BATCH)
    sampling = Sampling(ROWS + 1, BATCH, "poisson")
    return plan_privacy(sampling, delta=DELTA, epsilon=epsilon, rounds=steps).noise_multiplier


def trained(private: ExamplePrivacy | None, rounds: int, seed: int) -> Leak:
    """Federated averaging by clients of a few rows and one canary each, then the attacks."""
    source = digits()
    size, planted = CLIENTS * ROWS, odd(jax.random.key(seed), CLIENTS)
    drawn = np.random.default_rng(seed).permutation(len(source["train"].examples["label"]))
    pick = lambda rows: {name: x[rows] for name, x in source["train"].examples.items()}
    members, others = pick(drawn[:size]), pick(drawn[size : 2 * size])
    rows = {name: np.concatenate([x, planted[name].astype(x.dtype)]) for name, x in members.items()}
    own = [np.r_[i * ROWS : (i + 1) * ROWS, size + i] for i in range(CLIENTS)]
    people = Population(federate(rows, own), profiles(CLIENTS), np.zeros(CLIENTS, np.int32))
    algorithm = fed_avg(MODEL, TASK, Local(optax.sgd(0.5), BATCH, private=private))
    engine = compile_rounds(algorithm, people, cohort_size=CLIENTS)
    state = engine.init(MODEL.init(jax.random.key(seed + 100)), jax.random.key(seed))
    for _ in range(rounds):
        state, _ = engine.run(state)
    variables = state.server.variables
    losses = lambda rows: example_losses(MODEL, variables, TASK, rows)
    test = tasks.evaluate(MODEL.apply, variables, TASK, source["test"].examples, 50)
    bits = exposure(losses(planted), losses(odd(jax.random.key(seed + 1000), REFERENCES)))
    told = leakage(-losses(members), -losses(others))
    return Leak(float(test["accuracy"]), told.advantage, float(bits.mean()))


def dp_sgd(epsilons: tuple[float, ...], rounds: int, seeds: int) -> dict[str, dict[str, float]]:
    """Accuracy, membership advantage and exposure by epsilon of an example; "plain" beside."""
    arms: dict[str, ExamplePrivacy | None] = {"plain": None}
    for epsilon in epsilons:
        arms[f"{epsilon:g}"] = ExamplePrivacy(CLIP, example_noise(epsilon, rounds))
    table: dict[str, dict[str, float]] = {}
    for name, private in arms.items():
        runs = np.array([trained(private, rounds, seed) for seed in range(seeds)])
        fields = zip(Leak._fields, runs.mean(0), runs.std(0), strict=True)
        table[name] = {
            key: round(float(value), 4)
            for field, mean, spread in fields
            for key, value in ((field, mean), (f"{field}_spread", spread))
        }
        accuracy, advantage, bits = runs.mean(0)
        print(
            f"DP-SGD, epsilon {name}: accuracy {accuracy:.3f}, membership advantage "
            f"{advantage:.3f}, exposure {bits:.2f} of {math.log2(REFERENCES + 1):.0f} bits",
            flush=True,
        )
    return table


def inverted(noise_multiplier: float, seeds: int) -> dict[str, dict[str, float]]:
    """An image and a text from the gradient of one row, as it is and as DP-SGD sends it.

    "image_error" is the mean squared error over that of the image's own mean: 0 is the image, 1 is
    no better than grey. "text_recovered" is the share of places whose token was found.
    """
    table: dict[str, dict[str, float]] = {}
    for name, multiplier in (("plain", None), ("private", noise_multiplier)):
        found = np.array([
            (_image_error(multiplier, seed), _text_share(multiplier, seed)) for seed in range(seeds)
        ])  # fmt: skip
        error, share = map(float, found.mean(0))
        table[name] = {"image_error": round(error, 4), "text_recovered": round(share, 4)}
        print(f"gradient of one row, {name}: image error {error:.3f}, words found {share:.2f}")
    return table


def _sent(gradient: Any, multiplier: float | None, key: jax.Array) -> Any:
    if multiplier is None:
        return gradient
    return noised(clipped(gradient, jnp.float32(CLIP)), jnp.float32(multiplier * CLIP), key)


def _image_error(multiplier: float | None, seed: int) -> float:
    rows = {name: jnp.asarray(x[seed : seed + 1]) for name, x in digits()["train"].examples.items()}
    variables, keys = MODEL.init(jax.random.key(seed)), jax.random.split(jax.random.key(seed + 1))
    gradient = _sent(batch_gradient(MODEL, variables, TASK, rows), multiplier, keys[0])
    found = invert_gradient(
        MODEL, variables, TASK, gradient, rows["label"], rows["image"].shape[1:], keys[1],
        steps=300, total_variation=1e-4,
    )  # fmt: skip
    grey = jnp.square(rows["image"] - rows["image"].mean()).mean()
    return float(reconstruction_error(rows["image"], found.images)[0] / grey)


def _text_share(multiplier: float | None, seed: int) -> float:
    variables = READER.init(jax.random.key(seed))
    draw, noise, start = jax.random.split(jax.random.key(seed + 2), 3)
    tokens = jax.random.randint(draw, (1, WORDS), 0, 256, jnp.int32)
    labels = jnp.array([seed % 2], jnp.int32)
    batch = {"tokens": tokens, "mask": jnp.ones(tokens.shape, bool), "label": labels}
    gradient = _sent(batch_gradient(READER, variables, READING, batch), multiplier, noise)
    found = invert_text(READER, variables, READING, gradient, labels, WORDS, start)
    return recovered_tokens(tokens, found.tokens)
