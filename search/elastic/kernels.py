"""Elastic kernels: convolutions of which members keep the centre of the kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxfm.search.elastic.groups import ElasticGroup
from jaxfm.subnet import centre


def kernel_groups(
    sizes: Mapping[str, int], kernels: Sequence[int] | Mapping[str, Sequence[int]]
) -> tuple[ElasticGroup, ...]:
    """Returns one group for each kernel that may be smaller.

    Args:
      sizes: sizes of the model's kernels by name (`jaxfm.subnet.kernel_sizes`).
      kernels: as in `supernet`.
    Raises:
      ValueError: a name or a size that the model does not have, or sizes that leave no choice.
    """
    if isinstance(kernels, Mapping):
        chosen = dict(kernels)
    else:
        smaller = {name: [k for k in kernels if k <= size] for name, size in sizes.items()}
        chosen = {name: own for name, own in smaller.items() if sizes[name] in own and len(own) > 1}
    groups = []
    for name, own in chosen.items():
        if name not in sizes or sizes[name] not in own or max(own) > sizes[name]:
            raise ValueError(
                f"kernels of {name!r} are {tuple(own)}; give some up to the whole size of one of "
                f"the model's kernels, that size among them: {sizes}."
            )
        choices = tuple(sorted({len(centre(sizes[name], k)) for k in own}))
        groups.append(
            ElasticGroup(
                axis=name,
                layer=None,
                size=sizes[name],
                channel_multiple=1,
                least=choices[0],
                kernels=choices,
            )
        )
    if kernels and not groups:
        raise ValueError(f"kernels={kernels} leave no choice; the model's kernels are {sizes}.")
    return tuple(groups)
