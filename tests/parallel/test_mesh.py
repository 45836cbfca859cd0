import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxfm.model import layers_of, unstack, with_layers
from jaxfm.models.families.decoder import DecoderConfig, decoder
from jaxfm.parallel.decoders.plain import plain
from jaxfm.parallel.generation import generate
from jaxfm.parallel.mesh import make_mesh, shard, shardings


def test_every_mesh_has_all_axes_and_they_are_auto():
    mesh = make_mesh(clients=2)
    assert dict(mesh.shape) == {"stage": 1, "clients": 2, "data": 1, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}
    last = make_mesh(devices=jax.devices()[1:])
    assert last.devices.item() == jax.devices()[1]


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"stage": 3, "tensor": 4}, r"stage=3 x tensor=4 needs 12 devices; there are 2.*XLA_FLAGS"),
        ({"data": 0}, "data must have size 1 or more, got 0"),
    ],
)
def test_a_mesh_that_cannot_be_made_says_why(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**sizes)


def test_rules_place_named_axes_once_and_uneven_ones_raise_or_stay_whole():
    mesh = make_mesh(tensor=2)
    axes = {"a": {"kernel": ("embed", "mlp")}, "b": ("mlp", "vocab")}
    like = {"a": {"kernel": jnp.ones((3, 4))}, "b": jnp.ones((2, 6))}
    specs = jax.tree.map(lambda s: s.spec, shardings(axes, like, mesh))
    # One mesh axis splits one axis of an array only.
    expected = {"a": {"kernel": PartitionSpec(None, "tensor")}, "b": PartitionSpec("tensor", None)}
    assert specs == expected
    odd = {"a": {"kernel": jnp.ones((3, 5))}, "b": jnp.ones((2, 6))}
    with pytest.raises(ValueError, match=r"a\.kernel: axis 'mlp' of size 5 .* 'tensor' of size 2"):
        shardings(axes, odd, mesh)
    specs = jax.tree.map(lambda s: s.spec, shardings(axes, odd, mesh, replicate_uneven=True))
    assert specs["a"]["kernel"] == PartitionSpec(None, None)
    with pytest.raises(ValueError, match="'rows': the mesh has axes"):
        shardings(axes, like, mesh, {"mlp": "rows"})


def test_tensor_parallel_decoding_gives_the_tokens_of_one_device():
    config = DecoderConfig(
        vocab_size=64, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=48
    )
    model = decoder(config)
    variables = model.init(jax.random.key(0))
    split = shard(variables, model.axes, make_mesh(tensor=2))
    kernel = split.params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 32, 24)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    one, two = (generate(plain(model, v), prompts, max_new_tokens=12) for v in (variables, split))
    assert [t.tolist() for t in one.tokens] == [t.tolist() for t in two.tokens]


def test_unstacked_layers_are_sharded_like_stacked_ones():
    config = DecoderConfig(vocab_size=8, embed_dim=8, num_layers=2, num_heads=2, mlp_dim=8)
    model = decoder(config)
    variables = model.init(jax.random.key(0))
    apart = with_layers(variables, unstack(layers_of(variables)))
    specs = shardings(model.axes, apart, make_mesh(tensor=2)).params["layers"]
    assert set(specs) == {"0", "1"}
    assert specs["1"]["mlp"]["down"]["kernel"].spec == PartitionSpec("tensor", None)
