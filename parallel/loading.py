"""Decoders and drafters by name, for models in Hugging Face format.

    loaded = load_decoder("runs/demo/model", "speculative", draft="runs/demo/draft", length=4)
    generate(loaded.decoder, ["def "], tokenizer=loaded.tokenizer)

`DECODERS` has for each name a function `(model, variables, drafter, **options) -> Decoder`. Its
keyword-only parameters are the decoder's options on the command line (`--pipeinfer.width`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxfm import hub
from jaxfm.adapters.serving import side_by_side
from jaxfm.hub.metadata import stop_tokens
from jaxfm.model import Model, Variables
from jaxfm.parallel.cache import vocab_size
from jaxfm.parallel.decode import Decoder
from jaxfm.parallel.decoders.lookup import lookup
from jaxfm.parallel.decoders.plain import plain
from jaxfm.parallel.decoders.speculative import speculative
from jaxfm.parallel.drafters.composite import composite_drafter
from jaxfm.parallel.drafters.lookup import lookup_drafter
from jaxfm.parallel.drafters.model import early_exit_drafter, model_drafter
from jaxfm.parallel.drafting import Drafter
from jaxfm.parallel.mesh import make_mesh
from jaxfm.parallel.pipe.adapt import adapt as adapt_to_measurements
from jaxfm.parallel.pipe.pipeinfer import pipeinfer
from jaxfm.parallel.pipe.scheduler import limits
from jaxfm.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer


class LoadedDecoder(NamedTuple):
    """A decoder with the tokenizers that belong to it.

    Attributes:
      decoder: continues texts.
      tokenizer: of the model.
      draft_tokenizer: of the drafting model; None where there is none of its own.
      stop_tokens: the ids that end a text, by the model's files and its tokenizer.
    """

    decoder: Decoder
    tokenizer: HuggingFaceTokenizer
    draft_tokenizer: Tokenizer | None
    stop_tokens: tuple[int, ...]


def load_decoder(
    path: str,
    decoder: str = "plain",
    *,
    draft: str = "",
    adapter: str | Sequence[str] = (),
    **options: Any,
) -> LoadedDecoder:
    """A decoder of the model in a folder or on the hub.

    Args:
      path: folder or hub name of a causal language model.
      decoder: a name in `DECODERS`.
      draft: what drafts, as in `load_drafter`.
      adapter: folder of an adapter of the model, PEFT's or our own; of several, the decoder takes
        one request for each, in their order (`adapters.serving.side_by_side`).
      **options: keyword arguments of the function in `DECODERS`.
    Raises:
      ValueError: an unknown name, a draft that the decoder does not take or lacks, or whatever the
        decoder says of its options.
    """
    check_draft(decoder, draft)
    model, variables = hub.load(path)
    folders = ([adapter] if adapter else []) if isinstance(adapter, str) else list(adapter)
    check_adapters(decoder, len(folders))
    adapted = [hub.load_adapter(folder, model, variables) for folder in folders]
    if adapted:
        model, variables = adapted[0] if len(adapted) == 1 else side_by_side(adapted)
    drafter, draft_tokenizer = load_drafter(draft, model, variables)
    made = DECODERS[decoder](model, variables, drafter, **options)
    tokenizer = load_tokenizer(path)
    own = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    ends = tuple(sorted({*stop_tokens(model.config), *own}))
    return LoadedDecoder(made, tokenizer, draft_tokenizer, ends)


def check_adapters(decoder: str, number: int) -> None:
    """Raises ValueError for a decoder whose batches cannot have an adapter for each row."""
    if number > 1 and decoder == "pipeinfer":
        raise ValueError(
            f"The decoder pipeinfer takes one adapter, and {number} were given; rows of plain, "
            "speculative and lookup can have one each."
        )


def check_draft(decoder: str, draft: str) -> None:
    """Raises ValueError for an unknown decoder, or one that does not go with the draft."""
    if decoder not in DECODERS:
        raise ValueError(f"decoder={decoder!r} is not known. Known: {', '.join(DECODERS)}.")
    if decoder == "speculative" and draft in ("", "none"):
        raise ValueError("The decoder speculative needs a draft: give one, e.g. a model's folder.")
    if decoder in ("plain", "lookup") and draft:
        raise ValueError(f"The decoder {decoder} takes no draft, but draft={draft!r} was given.")


def load_drafter(
    name: str, model: Model, variables: Variables
) -> tuple[Drafter | None, Tokenizer | None]:
    """The drafter of a name, and its tokenizer if it is a model of its own.

    Args:
      name: "" or "none"; "lookup"; "exit:N" for the model's own first N layers; folder or hub name
        of a model; or "lookup+" and one of the latter two.
      model, variables: the target.
    Raises:
      ValueError: N is no number, or nothing follows "lookup+".
    """
    if name in ("", "none"):
        return None, None
    if name == "lookup":
        return lookup_drafter(), None
    if name.startswith("lookup+"):
        second, tokenizer = load_drafter(name.removeprefix("lookup+"), model, variables)
        if second is None:
            raise ValueError(f"draft={name!r}: name a second drafter after lookup+.")
        return composite_drafter(lookup_drafter(), second), tokenizer
    if name.startswith("exit:"):
        layers = name.removeprefix("exit:")
        if not layers.isdigit():
            raise ValueError(f"draft={name!r}: give a number of layers, as in exit:2.")
        return early_exit_drafter(model, variables, int(layers)), None
    # Their tokenizers are compared by `generate`; rows beyond the tokens may differ.
    tokens = vocab_size(model, variables)
    return model_drafter(*hub.load(name), target_tokens=tokens), load_tokenizer(name)


def _plain(model: Model, variables: Variables, drafter: None) -> Decoder:
    """One token of each text a pass."""
    return plain(model, variables)


def _lookup(
    model: Model, variables: Variables, drafter: None, *,
    length: int = 4, max_ngram: int = 4, min_ngram: int = 1,
) -> Decoder:  # fmt: skip
    """Drafts are copied from an earlier place in the same text.

    Args:
      length: tokens drafted a pass.
      max_ngram: longest ending of the text that is looked for.
      min_ngram: shortest ending of the text that is looked for.
    """
    return lookup(model, variables, length=length, max_ngram=max_ngram, min_ngram=min_ngram)


def _pipeinfer(
    model: Model, variables: Variables, drafter: Drafter | None, *,
    stages: int = 1, tensor: int = 1, layers: tuple[int, ...] | None = None, own_slot: bool = False,
    width: int = 1, levels: int = 1, window: int | None = None, accept: float = 0.0,
    branch: float = 0.0, recovery: float = 0.0, decay: float = 0.0, adapt: bool = False,
    record: int = 0,
) -> Decoder:  # fmt: skip
    """Continuous speculation through a pipe of stages, with early cancellation.

    Args:
      stages: stages that the model is cut over.
      tensor: devices of each stage.
      layers: layers of each stage; none: as even as possible.
      own_slot: one device more, for the draft alone.
      width: candidates kept alive at each depth.
      levels: tokens of a path drafted a tick.
      window: most packets in flight; none: as many as there are.
      accept: least probability of a drafted token.
      branch: least probability of a second candidate.
      recovery: added to both probabilities for each packet in flight.
      decay: taken from both probabilities for each time in a row that nothing was drafted.
      adapt: choose drafts, branches and window by what is measured, up to the options given.
      record: ticks whose timeline is kept for a report.
    """
    for name, value in (("stages", stages), ("tensor", tensor)):
        if value < 1:
            raise ValueError(f"{name}={value}: give at least 1.")
    settings = limits(
        width=width if drafter else 0, levels=levels, window=1 << 30 if window is None else window,
        accept=accept, branch=branch, recovery=recovery, decay=decay,
    )  # fmt: skip
    decoder = pipeinfer(
        model, variables, drafter, mesh=make_mesh(stage=stages + own_slot, tensor=tensor),
        split=layers, width=width, levels=levels, own_slot=own_slot, limits=settings, record=record,
    )  # fmt: skip
    return adapt_to_measurements(decoder) if adapt else decoder


DECODERS: Mapping[str, Callable[..., Decoder]] = {
    "plain": _plain,
    "speculative": speculative,
    "lookup": _lookup,
    "pipeinfer": _pipeinfer,
}
