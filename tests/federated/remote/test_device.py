"""What a device gets runs without the library."""

import subprocess
import sys

import chex
import numpy as np
from laws import ADAPTED, examples, make, start

from jaxfm.adapters import merge
from jaxfm.federated.remote.device import save_for_device

DEVICE = """
import sys
import numpy as np
from jax import export
from safetensors.numpy import load_file
for name in sys.argv[1:]:
    program = export.deserialize(bytearray(open(f"{name}/model.stablehlo", "rb").read()))
    x = np.load("x.npy")
    np.save(f"{name}/output.npy", program.call(load_file(f"{name}/params.safetensors"), x))
assert not any(name.split(".")[0] == "jaxfm" for name in sys.modules)
"""


def test_slices_and_adapted_networks_run_in_a_process_without_the_library(tmp_path):
    x = examples(4)["x"]
    np.save(tmp_path / "x.npy", x)
    algorithm = make("hetero_fl")
    server = algorithm.init(start())
    networks = {
        f"tier_{b}": (bucket.model, bucket.shared(server))
        for b, bucket in enumerate(algorithm.buckets)
    } | {"adapted": (ADAPTED, start(name="fed_lora"))}
    for name, (model, variables) in networks.items():
        save_for_device(tmp_path / name, model, variables, x)
    words = [sys.executable, "-c", DEVICE, *networks]
    subprocess.run(words, check=True, cwd=tmp_path)
    for name, (model, variables) in networks.items():
        if model is ADAPTED:
            model, variables = merge(model, variables)
        expected, _ = model.apply(variables, x)
        output = np.load(tmp_path / name / "output.npy")
        chex.assert_trees_all_close(output, np.asarray(expected), rtol=1e-5, atol=1e-6)
    sizes = [(tmp_path / f"tier_{b}/params.safetensors").stat().st_size for b in range(2)]
    assert sizes[1] < sizes[0]
