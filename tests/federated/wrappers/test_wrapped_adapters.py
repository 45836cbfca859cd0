"""Which aggregations of adapters can be private, secure or robust: those that are plain sums."""

import jax
import numpy as np
import optax
import pytest

from jaxfm import tasks
from jaxfm.adapters import lora
from jaxfm.data.arrays import digits
from jaxfm.data.dealing import deal_out
from jaxfm.federated import Local
from jaxfm.federated.accounting.privacy import Sampling, plan_privacy
from jaxfm.federated.placement import place
from jaxfm.federated.preparation import make_setting
from jaxfm.federated.registry import find, make
from jaxfm.federated.wrappers.private import with_privacy
from jaxfm.federated.wrappers.robust import named_robust
from jaxfm.federated.wrappers.secure import with_secure_sums
from jaxfm.models.by_name import image_classifier

DATA = deal_out(digits(), tasks.classification(10), num_clients=6, beta=0.5)
SIZES = {"embed_dim": 16, "num_layers": 2, "num_heads": 2, "mlp_dim": 16}
NET = image_classifier("mlp", DATA.validation["image"].shape[1:], 10, **SIZES)
MODEL = lora(NET, 2, targets="dense1")
SETTING = make_setting(MODEL, DATA, Local(optax.sgd(0.1), 4), num_rounds=2)
PLAN = plan_privacy(
    Sampling(kind="poisson", num_clients=6, cohort_size=3), epsilon=8.0, delta=1e-2, rounds=2
)
WRAPPERS = {
    "private": lambda algorithm: with_privacy(algorithm, PLAN, clip=1.0),
    "secure": lambda algorithm: with_secure_sums(algorithm, 3),
    "robust": lambda algorithm: named_robust(algorithm, rule="median"),
}
# What is set side by side, or is another part of the model for each round, is no plain sum.
FITTING = {"ffa_lora": set(WRAPPERS), "fed_sb": set(WRAPPERS), "ro_lora": {"robust"}}
STACKED = ["fed_lora", "fed_ex_lora", "flora", "flex_lora", "ra_flora", "het_lora"]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", [*FITTING, *STACKED])
def test_only_plain_sums_are_wrapped(name, wrapper):
    algorithm = make(find(name), SETTING, {})
    start = jax.tree.map(np.asarray, SETTING.variables)
    if wrapper in FITTING.get(name, ()):
        place(WRAPPERS[wrapper](algorithm), DATA.train, start)
        return
    with pytest.raises(ValueError, match=r"no sum|no plain sum|side by side|already combined|more "
                       r"than means|another part"):  # fmt: skip
        place(WRAPPERS[wrapper](algorithm), DATA.train, start)
