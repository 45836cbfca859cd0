"""Laws of checkpoints: what is saved comes back, and a damaged or killed save costs one step."""

import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxfm.checkpoint import Checkpointer


class State(NamedTuple):
    params: dict
    optimizer: optax.OptState
    key: jax.Array
    round: int


def make_state(seed: int = 0) -> State:
    key = jax.random.key(seed)
    params = {
        "layers": {"w": jax.random.normal(key, (4, 8)), "b": jnp.ones((8,), jnp.bfloat16)},
        "empty": jnp.zeros((0, 3)),
        "mask": np.array([True, False]),
    }
    return State(params, optax.adam(1e-3).init(params["layers"]), jax.random.split(key, 3), seed)


def assert_same(actual: State, expected: State) -> None:
    unkeyed = [
        s._replace(key=jax.random.key_data(s.key), round=np.asarray(s.round))
        for s in (actual, expected)
    ]
    chex.assert_trees_all_equal_structs(*unkeyed)
    chex.assert_trees_all_equal_dtypes(*unkeyed)
    chex.assert_trees_all_equal(*unkeyed)


@pytest.mark.smoke
def test_restored_equals_saved(tmp_path):
    state = make_state(7)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(3, state)
    with Checkpointer(tmp_path) as checkpoints:
        step, restored = checkpoints.restore(make_state(0))
    assert step == 3
    assert_same(restored, state)
    assert restored.key.dtype == state.key.dtype
    assert isinstance(restored.params["mask"], np.ndarray) and type(restored.round) is int
    np.testing.assert_array_equal(
        jax.random.uniform(restored.key[1], (4,)), jax.random.uniform(state.key[1], (4,))
    )


def test_an_abstract_tree_is_enough(tmp_path):
    state = make_state(1)._replace(round=jnp.int32(1))
    state.params["mask"] = jnp.asarray(state.params["mask"])
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        _, restored = checkpoints.restore(jax.eval_shape(lambda: state))
    assert_same(restored, state)


def test_a_save_is_due_when_the_last_took_a_fiftieth_of_the_time_since(tmp_path, monkeypatch):
    now, may_end = [1000.0], threading.Event()
    seal = Checkpointer._seal

    def slow(self):
        assert may_end.wait(60)
        now[0] += 3.0
        seal(self)

    monkeypatch.setattr(Checkpointer, "_seal", slow)
    monkeypatch.setattr("jaxfm.checkpoint.time.monotonic", lambda: now[0])
    with Checkpointer(tmp_path) as checkpoints:
        assert checkpoints.is_due()
        checkpoints.save(1, make_state())
        now[0] = 2000.0
        assert not checkpoints.is_due(), "it is still being written"
        now[0] = 1000.0
        may_end.set()
        checkpoints.wait()
        for seconds, due in ((1003.0, False), (1149.0, False), (1150.0, True)):
            now[0] = seconds
            assert checkpoints.is_due() == due


def test_a_save_that_failed_is_heard_of_before_the_next_one_is_due(tmp_path, monkeypatch):
    def fails(self):
        raise OSError("No space left on device")

    monkeypatch.setattr(Checkpointer, "_seal", fails)
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(1, make_state())
    with pytest.raises(OSError, match=r"step_00000001 could not be saved \(No space left"):
        for _ in range(600):  # it is being written
            assert not checkpoints.is_due()
            time.sleep(0.1)
    checkpoints.close()


def test_saved_values_are_those_of_the_call_even_if_donated(tmp_path):
    bump = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jax.random.normal(jax.random.key(0), (1000, 1000))
    expected = np.array(x)
    host = np.zeros(3)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(0, {"x": x, "host": host})
        host += 1
        for _ in range(5):
            x = bump(x)
        x.block_until_ready()
        _, restored = checkpoints.restore({"x": x, "host": host})
    np.testing.assert_array_equal(restored["x"], expected)
    np.testing.assert_array_equal(restored["host"], np.zeros(3))


def test_two_devices_and_one_read_each_other(tmp_path):
    devices = jax.devices()
    assert len(devices) == 2
    mesh = jax.make_mesh((2,), ("clients",), axis_types=(jax.sharding.AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("clients"))
    x, keys = jnp.arange(8.0), jax.random.split(jax.random.key(1), 4)
    on_two = {"x": jax.device_put(x, split), "keys": jax.device_put(keys, split)}
    on_one = jax.device_put({"x": x, "keys": keys}, devices[0])
    for name, saved, like in (("a", on_two, on_one), ("b", on_one, on_two)):
        with Checkpointer(tmp_path / name) as checkpoints:
            checkpoints.save(1, saved)
            _, restored = checkpoints.restore(like)
        for leaf in ("x", "keys"):
            assert restored[leaf].sharding.is_equivalent_to(like[leaf].sharding, 1)
        np.testing.assert_array_equal(restored["x"], x)
        np.testing.assert_array_equal(
            jax.random.key_data(restored["keys"]), jax.random.key_data(keys)
        )


def test_the_newest_stay(tmp_path):
    with Checkpointer(tmp_path, keep=2) as checkpoints:
        for step in (1, 5, 10, 11):
            checkpoints.save(step, {"x": jnp.full((2,), step)})
        checkpoints.wait()
        assert checkpoints.steps() == [10, 11] and checkpoints.latest_step() == 11
        assert checkpoints.restore({"x": jnp.zeros((2,), int)}, step=10)[1]["x"][0] == 10
    with pytest.raises(ValueError, match="keep=0: give the number"):
        Checkpointer(tmp_path, keep=0)


def damage_missing(file: pathlib.Path) -> None:
    file.unlink()


def damage_truncated(file: pathlib.Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def damage_flipped(file: pathlib.Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [damage_missing, damage_truncated, damage_flipped])
def test_damage_to_any_file_falls_back_with_a_warning(tmp_path, damage):
    states = {step: {"x": jax.random.normal(jax.random.key(step), (64, 64))} for step in (1, 2)}
    with Checkpointer(tmp_path / "whole") as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state)
    newest = tmp_path / "whole" / "step_00000002"
    files = [file for file in sorted(newest.glob("*/**/*")) if file.is_file()]
    names = [file.relative_to(newest) for file in [newest / "crc32.json", *files]]
    assert len(names) >= 8
    for number, name in enumerate(names):
        copy = tmp_path / f"copy{number}"
        shutil.copytree(tmp_path / "whole", copy)
        damage(copy / newest.name / name)
        with Checkpointer(copy) as checkpoints:
            with pytest.warns(UserWarning, match=f"{copy}/step_00000002: "):
                step, restored = checkpoints.restore(states[2])
            assert step == 1
            chex.assert_trees_all_equal(restored, states[1])


def test_a_fall_back_can_go_on_with_one_checkpoint_kept(tmp_path):
    state = {"x": jnp.arange(4)}
    with Checkpointer(tmp_path, keep=2) as checkpoints:
        checkpoints.save(10, state)
        checkpoints.save(12, state)
    (tmp_path / "step_00000012" / "leaves" / "metadata").write_text("{")
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        with pytest.warns(UserWarning, match="step_00000012"):
            checkpoints.restore(state)
        checkpoints.save(11, state)
        checkpoints.wait()
        with pytest.warns(UserWarning, match="step_00000012"):
            assert checkpoints.restore(state)[0] == 11
        checkpoints.save(12, state)  # takes the damaged one's place
        assert checkpoints.restore(state)[0] == 12


def test_another_tree_is_refused_by_leaf_and_shapes(tmp_path):
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(4, {"layers": {"w": jnp.zeros((4, 8)), "old": jnp.zeros((2,))}})
        like = {"layers": {"w": jnp.zeros((4, 16)), "new": jnp.zeros((), jnp.bfloat16)}}
        with pytest.raises(ValueError) as error:
            checkpoints.restore(like)
    message = str(error.value)
    assert "step_00000004 holds another tree" in message
    assert "layers.w: saved float32[4, 8], asked for float32[4, 16]" in message
    assert "layers.old: saved float32[2], asked for nothing" in message
    assert "layers.new: saved nothing, asked for bfloat16[]" in message


def test_what_cannot_be_done_says_why(tmp_path):
    with Checkpointer(tmp_path / "none") as checkpoints:
        assert checkpoints.latest_step() is None
        with pytest.raises(FileNotFoundError, match=r"No checkpoint in .*none\."):
            checkpoints.restore({"x": jnp.zeros(())})
        with pytest.raises(TypeError, match="leaf 'name' is a str"):
            checkpoints.save(0, {"name": "jaxfm"})
        with pytest.raises(ValueError, match=r"same dotted name 'a\.b'"):
            checkpoints.save(0, {"a": {"b": jnp.zeros(())}, "a.b": jnp.zeros(())})
        with pytest.raises(ValueError, match="step=-1"):
            checkpoints.save(-1, {"x": jnp.zeros(())})
        with pytest.raises(ValueError, match=r"has '\[' in its path, where checkpoints could be"):
            Checkpointer(tmp_path / "a [1]")
        checkpoints.save(5, {"x": jnp.zeros(())})
    with Checkpointer(tmp_path / "none") as checkpoints:
        with pytest.raises(ValueError, match=r"step=5: .* already holds step 5"):
            checkpoints.save(5, {"x": jnp.zeros(())})
        with pytest.raises(FileNotFoundError, match="No checkpoint of step 3"):
            checkpoints.restore({"x": jnp.zeros(())}, step=3)


SAVE_FOREVER = """
import sys, jax.numpy as jnp
from jaxfm.checkpoint import Checkpointer
with Checkpointer(sys.argv[1], keep=3) as checkpoints:
    start = checkpoints.latest_step()
    for step in range(0 if start is None else start + 1, 10_000):
        checkpoints.save(step, {"a": jnp.full((300, 300), step), "b": jnp.full((300, 300), -step)})
        print(step, flush=True)
"""


def test_killed_while_saving_leaves_the_earlier_ones_whole(tmp_path):
    like = {"a": jnp.zeros((300, 300), int), "b": jnp.zeros((300, 300), int)}
    delays = random.Random(0)
    reached = -1
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        announced = [int(process.stdout.readline()) for _ in range(4)]
        time.sleep(delays.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert announced[0] == reached + 1 or reached == -1
        with Checkpointer(tmp_path) as checkpoints:
            reached, restored = checkpoints.restore(like)
        # A save begins only once the one before it is on disk.
        assert reached >= announced[-1] - 1
        np.testing.assert_array_equal(restored["a"], np.full((300, 300), reached))
        np.testing.assert_array_equal(restored["b"], np.full((300, 300), -reached))


def test_saving_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    """The call returns while the checkpoint cannot yet be finished; waiting finishes it."""
    disk_is_free = threading.Event()
    seal = Checkpointer._seal

    def seal_later(self):
        assert disk_is_free.wait(timeout=60)
        seal(self)

    monkeypatch.setattr(Checkpointer, "_seal", seal_later)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(0, {"x": jnp.ones((4,))})
        assert checkpoints.steps() == []
        disk_is_free.set()
        checkpoints.wait()
        assert checkpoints.steps() == [0]


def test_a_failed_save_is_raised_by_the_next_call(tmp_path, monkeypatch):
    def full_disk(self):
        raise OSError("No space left on device")

    monkeypatch.setattr(Checkpointer, "_seal", full_disk)
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(0, {"x": jnp.ones((4,))})
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(1, {"x": jnp.ones((4,))})
    checkpoints.close()
    assert checkpoints.steps() == []
