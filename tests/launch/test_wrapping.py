"""A run's wrappers, composed from its config: what fits together, and what does not."""

import math

import jax
import optax
import pytest

from jaxfm import tasks
from jaxfm.config import override
from jaxfm.federated import Local, fed_avg, fed_per
from jaxfm.federated.parts.private_gradient import ExamplePrivacy
from jaxfm.launch.federate import local_training
from jaxfm.launch.federate_config import FederateConfig
from jaxfm.launch.wrapping import wrapped
from jaxfm.models import mlp

MODEL, TASK, LOCAL = mlp((6, 8, 3)), tasks.classification(3), Local(optax.sgd(0.1), 4)
FED_AVG = fed_avg(MODEL, TASK, LOCAL)


def wrap(*flags: str, algorithm=FED_AVG):
    config = override(FederateConfig(), "cohort_size=4", "data.num_clients=20", *flags)
    return wrapped(config, 20)(algorithm)


def test_privacy_is_off_and_on():
    assert wrap().privacy is None
    privacy = wrap("private.epsilon=100", "private.noise_multiplier=2", "rounds=3").privacy
    assert privacy.noise_multiplier == 2 and privacy.rounds == 3
    assert (privacy.sampling.kind, privacy.sampling.cohort_size) == ("poisson", 4)
    assert wrap("private.noise_multiplier=2").privacy.rounds is None


def test_a_budget_asks_for_noise():
    privacy = wrap("private.epsilon=3", "rounds=5", "private.delta=1e-4").privacy
    assert 2.9 < privacy.spent(5) <= 3 < privacy.spent(6)


def test_clients_with_memories_are_accounted_for_without_sampling():
    algorithm = fed_per(MODEL, TASK, LOCAL, is_personal=lambda path: path[0] == "dense2")
    sampling = wrap("private.noise_multiplier=2", algorithm=algorithm).privacy.sampling
    assert not sampling.secret and sampling.kind == "fixed"


def test_clients_that_take_turns_have_correlated_noise():
    flags = ("private.sampling=in_turn", "private.delta=1e-4", "rounds=6")
    privacy = wrap("private.epsilon=3", "private.bands=2", *flags).privacy
    assert privacy.sampling.kind == "in_turn" and len(privacy.strategy.coefficients) == 2
    assert 2.9 < privacy.spent(6) <= 3
    plain = wrap("private.noise_multiplier=3", *flags).privacy
    assert plain.strategy is None and plain.spent(6) == plain.spent(10)  # 2 turns of each


def test_examples_are_private_by_settings_of_their_own():
    config = override(FederateConfig(), "examples.noise_multiplier=1.5", "examples.clip=0.5")
    assert local_training(config).private == ExamplePrivacy(0.5, 1.5, 8)
    assert local_training(FederateConfig()).private is None
    with pytest.raises(ValueError, match=r"examples\.clip=2\.0 changes nothing without"):
        override(FederateConfig(), "examples.clip=2")


def test_secure_sums_of_clipped_uploads_have_fine_steps():
    """Limits are powers of two: of the clipping norm, of it with noise, as given, the first one."""
    variables = MODEL.init(jax.random.key(0))
    limit = lambda *flags: float(wrap("secure.on=True", *flags).init(variables).limit)
    private = ("private.noise_multiplier=1.5", "private.clip=2")
    assert limit(*private) == 2
    assert limit(*private, "private.noise=clients") == 16 > 2 + 8 * 1.5 * 2 / math.sqrt(4)
    assert limit(*private, "secure.limit=100") == 128
    assert limit() == 2.0**14
    assert wrap("secure.on=True", *private).privacy


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("private.clip=2",), "private.clip=2.0 changes nothing without --private.epsilon"),
        (("private.epsilon=-1",), "private.epsilon=-1.0: give at least 0"),
        (("private.epsilon=nan",), "private.epsilon=nan: give at least 0"),
        (("private.epsilon=1", "private.quantile=1"), "private.quantile=1.0: give a share below 1"),
        (("private.noise_multiplier=1", "private.delta=0"), "delta=0.0 must be a probability"),
        (("private.noise_multiplier=1", "private.delta=0.2"), "would allow to publish one of 20"),
        (("private.noise_multiplier=1", "private.clip=0"), "clip=0.0 must be a norm above 0"),
        (("private.noise_multiplier=1", "upload=top_k"), "tells who was drawn before"),
        (("private.noise_multiplier=1", "upload=sparse"), "tells who was drawn before"),
        (("private.noise_multiplier=1", "quorum=2"), "so a private round counts whoever reports"),
        (
            ("private.noise_multiplier=1", "private.noise=clients", "upload=8bit"),
            "would change the noise of the sum",
        ),
        (("private.epsilon=1", "private.bands=2"), "private.bands=2 is for --private.sampling=in"),
        (
            (
                "private.epsilon=1",
                "private.sampling=in_turn",
                "private.bands=2",
                "private.buffers=1",
            ),
            "private.bands=2 and private.buffers=1: give one of them",
        ),
        (("private.epsilon=1", "private.buffers=1"), "private.buffers=1 is for --private.samp"),
        (("private.noise_multiplier=1", "private.least_reports=2"), "is for noise of the clients"),
    ],
)
def test_what_does_not_fit_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        wrap(*flags)


def test_rounded_uploads_of_private_clients_are_fine():
    algorithm = wrap("private.noise_multiplier=1", "upload=8bit", "download=8bit")
    state = jax.eval_shape(algorithm.init, jax.eval_shape(MODEL.init, jax.random.key(0)))
    assert state.clip.shape == ()
