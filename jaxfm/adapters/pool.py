"""A pool of prompts, from which each input takes those whose keys are most like it (L2P).

    q = f(x)                                     the frozen model's vector of the input
    K_x = the N keys of the largest cos(q, k)    equation 3, without weights by frequency
    f([P_i for k_i in K_x; x])                   equation 1
    loss + pull * sum over K_x of 1 - cos(q, k)  equation 4

The pool is shared. Prompts that stay with their owners are a soft prompt around it:

    model = soft_prompt(prompt_pool(model), 4, name="personal", trained=("pool", "head"))
    fed_per(model, task, local, is_personal=under("personal"))

The output is that of the class token, where the paper takes the mean over the prompts' places.
Source: Wang et al. 2022 (Learning to Prompt for Continual Learning), sections 4.1 and 4.2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxfm.adapters.adapter import Part, root_of, surround
from jaxfm.adapters.prompts import check_room, stream_of, with_virtual
from jaxfm.adapters.targets import is_trained_by
from jaxfm.frozen import thaw
from jaxfm.kernels import at_least_float32
from jaxfm.model import Array, Key, Model, PyTree, Variables
from jaxfm.models.families.encoder import EncoderConfig, encoder
from jaxfm.models.families.vit import VitConfig, vit
from jaxfm.virtual_tokens import VIRTUAL

_POOL = "pool"

# (variables of the plain model, inputs) -> vectors [B, Q]
Query = Callable[[Variables, Any], Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """A pool of prompts, as it is written beside its parameters.

    Attributes:
      kind: "pool".
      num_prompts: in the pool.
      prompt_len: vectors of a prompt.
      top: prompts that an input takes.
      pull: weight of the loss that moves keys to the inputs that take them.
      trained: patterns of the model's own parameters that are trained, too.
    """

    kind: str = "pool"
    num_prompts: int
    prompt_len: int
    top: int
    pull: float = 0.5
    trained: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Vectors before an input."""
        return self.top * self.prompt_len


def prompt_pool(
    model: Model,
    num_prompts: int = 10,
    prompt_len: int = 5,
    top: int = 5,
    *,
    pull: float = 0.5,
    query: Query | None = None,
    query_dim: int | None = None,
    trained: str | Sequence[str] = (),
) -> Model:
    """Returns the model with prompts from a shared pool before each input, and all else frozen.

    In training the gradient is that of the loss plus `pull` times the mean over the batch of the
    chosen keys' distances; the loss that is reported has no such term.

    Args:
      model: an encoder, ViT or classifying decoder, plain or adapted.
      num_prompts: M, of the pool.
      prompt_len: vectors of each.
      top: N, prompts that an input takes.
      pull: weight of the distance between keys and the queries that chose them.
      query: `(variables, inputs) -> [B, Q]` of the model without prompts; None: the class token
        that the last layer of an encoder or ViT gives.
      query_dim: Q; None: the width of the model.
      trained: as in `soft_prompt`.
    Raises:
      ValueError: settings out of range, a model without a place for prompts, or one that needs a
        `query`.
    """
    for name, value in (("num_prompts", num_prompts), ("prompt_len", prompt_len)):
        if value < 1:
            raise ValueError(f"{name}={value}: give at least 1.")
    if not 1 <= top <= num_prompts:
        raise ValueError(f"top={top}: give a number from 1 to num_prompts={num_prompts}.")
    shapes = check_room(model, top * prompt_len)
    root = root_of(model)
    ask = query or _class_token(root)
    width, dtype = stream_of(shapes)
    dtype = at_least_float32(dtype)
    keys_shape = (num_prompts, query_dim or width)

    def fresh(params: PyTree, key: Key) -> PyTree:
        own, other = jax.random.split(key)
        keys = jax.random.normal(own, keys_shape, dtype)
        prompts = 0.02 * jax.random.normal(other, (num_prompts, prompt_len, width), dtype)
        return {_POOL: {"keys": keys, "prompts": prompts}}

    def apply(variables: Variables, inputs, *, train: bool = False, key: Key | None = None):
        pool = variables.params[_POOL]
        params = {name: part for name, part in variables.params.items() if name != _POOL}
        bare = {name: part for name, part in params.items() if name != VIRTUAL}
        asked = lax.stop_gradient(ask(variables._replace(params=bare), inputs))
        likeness = _cosines(asked.astype(pool["keys"].dtype), pool["keys"])
        nearest, chosen = lax.top_k(likeness, top)
        vectors = pool["prompts"][chosen]
        vectors = vectors.reshape(vectors.shape[0], top * prompt_len, width)
        prompted = variables._replace(params=with_virtual(params, vectors))
        output, stats = root.apply(prompted, inputs, train=train, key=key)
        if train:
            output = _with_loss(output, pull * (1 - nearest).sum(-1).mean())
        return output, stats

    trained = (trained,) if isinstance(trained, str) else tuple(trained)
    part = Part(
        axes={_POOL: {"keys": (None, None), "prompts": (None, None, "embed")}},
        fresh=fresh,
        is_own=lambda path: path[0] == _POOL,
        join=lambda params, key: params,  # `apply` takes the pool itself: it needs the inputs
    )
    config = PoolConfig(
        num_prompts=num_prompts, prompt_len=prompt_len, top=top, pull=pull, trained=trained
    )
    pooled = root._replace(apply=apply, stages=None)
    return surround(model, part, is_trained_by(model, trained), config, root=pooled)


def _class_token(root: Model) -> Query:
    """The first token after the last layer of an encoder or ViT."""
    makers: Mapping[type, Callable] = {EncoderConfig: encoder, VitConfig: vit}
    make = makers.get(type(root.config))
    if make is None:
        raise ValueError(
            "This model has no class token to choose prompts by: give `query`, a function of "
            "variables and inputs that returns a vector for each input."
        )
    body = make(dataclasses.replace(root.config, head="none"))
    return lambda variables, inputs: body.apply(thaw(variables), inputs)[0][:, 0]


def _cosines(queries: Array, keys: Array) -> Array:
    """[B, M] of queries [B, Q] and keys [M, Q]."""
    unit = lambda x: x * lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)
    return unit(queries) @ unit(keys).T


@jax.custom_vjp
def _with_loss(output: PyTree, loss: Array) -> PyTree:
    """The output; a gradient that goes through it is that of the objective plus `loss`."""
    return output


def _forward(output: PyTree, loss: Array) -> tuple[PyTree, None]:
    return output, None


def _backward(_: None, cotangent: PyTree) -> tuple[PyTree, Array]:
    return cotangent, jnp.ones((), jnp.float32)


_with_loss.defvjp(_forward, _backward)
