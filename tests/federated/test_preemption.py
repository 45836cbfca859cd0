"""SIGTERM ends a run after the step it is in; what was done is saved, and the run goes on."""

import os
import signal
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from jaxfm.checkpoint import Checkpointer
from jaxfm.errors import explain
from jaxfm.federated.outcome import no_account
from jaxfm.federated.playing import Script, play
from jaxfm.model import Variables
from jaxfm.preemption import Preempted


def test_a_stopped_run_saves_and_goes_on(tmp_path):
    taken = []

    def advance(number, state, account):
        taken.append(number)
        if taken == [1, 2, 3]:
            os.kill(os.getpid(), signal.SIGTERM)
        return state + number, account, {}

    def again():
        script = Script(advance, lambda state: {}, lambda x: SimpleNamespace(
            variables=Variables({"x": x}, {}, {})
        ))  # fmt: skip
        return play(
            script, jnp.zeros(()), no_account(1), length=5, eval_every=5, names=["a"],
            run_dir=tmp_path,
        )  # fmt: skip

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match=r"after round 3 .* the same command goes on") as error:
        again()
    assert explain(error.value)[1] == 75
    assert signal.getsignal(signal.SIGTERM) is before
    assert float(again().state) == 15
    assert taken == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("due, kept", [(False, [5]), (True, [4, 5])])
def test_a_run_saves_where_it_is_due_and_at_its_end(tmp_path, monkeypatch, due, kept):
    monkeypatch.setattr(Checkpointer, "is_due", lambda self: due)
    script = Script(
        lambda number, state, account: (state + number, account, {}), lambda state: {},
        lambda x: SimpleNamespace(variables=Variables({"x": x}, {}, {})),
    )  # fmt: skip
    play(
        script, jnp.zeros(()), no_account(1), length=5, eval_every=2, names=["a"], run_dir=tmp_path
    )
    with Checkpointer(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == kept
