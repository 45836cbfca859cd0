"""The README stays true: its code runs, its commands and links exist."""

import importlib
import pathlib
import re
import shlex

import jax
import pytest

from jaxfm import hub
from jaxfm.config import define_flags, from_flags
from jaxfm.launch import continual, demo, generate, pretrain, prompts, report, simulate, supernet
from jaxfm.launch import search as search_script
from jaxfm.launch.cluster.config import ClusterConfig
from jaxfm.launch.cluster.project import ProjectConfig
from jaxfm.launch.cluster.render import flags_of
from jaxfm.launch.federate_config import FederateConfig
from jaxfm.launch.flower.app import read_flags
from jaxfm.launch.flower.commands import COMMANDS as COMMANDS_OF_FLOWER
from jaxfm.launch.flower.commands import split
from jaxfm.launch.hpc.commands import command as hpc_command
from jaxfm.launch.setup import load_data
from jaxfm.processes import FLAGS
from jaxfm.testing import tiny_decoder

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [c for c in re.findall(r"`(python [^`]+)`", README) if "<" not in c]
CONFIGS = {
    "continual": continual.ContinualConfig,
    "demo": demo.DemoConfig,
    "federate": FederateConfig,
    "generate": generate.GenerateConfig,
    "pretrain": pretrain.PretrainConfig,
    "prompts": prompts.PromptsConfig,
    "report": report.ReportConfig,
    "search": search_script.SearchConfig,
    "simulate": simulate.SimulateConfig,
    "supernet": supernet.SupernetConfig,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "model"
    model = tiny_decoder(max_len=128)
    hub.save(model, model.init(jax.random.key(0)), folder)
    return folder


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_code_runs(block, llama, capsys):
    code = block.replace("path/to/a/llama", str(llama))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist(command):
    from absl import flags

    words = shlex.split(command)[1:]
    if words[0] == "-m":
        words = [word for word in words if word.partition("=")[0].lstrip("-") not in FLAGS]
        if words[1:3] == ["jaxfm.launch.cluster", "project"]:
            config, words = ProjectConfig, [*words[:2], *words[3:]]
        elif words[1] == "jaxfm.launch.cluster":
            config, words = ClusterConfig, [*words[:2], *flags_of(words[2:])]
        elif words[1] == "jaxfm.launch.hpc":
            module, flagged = hpc_command(words[2:])
            config, words = module.CONFIG, [*words[:2], *flagged[1:]]
        elif words[1] == "jaxfm.launch.flower":
            name, own, flagged = split(words[2:])
            module = importlib.import_module(COMMANDS_OF_FLOWER[name])
            config, words = module.CONFIG, [*words[:2], *own]
            assert read_flags(flagged).data.source
        else:
            config = CONFIGS[words[1].removeprefix("jaxfm.launch.")]
        values = flags.FlagValues()
        define_flags(config, values)
        assert values(["script", *words[2:]]) == ["script"]  # nothing is left unread
        made = from_flags(config, values)  # which says what does not go together
        if getattr(getattr(made, "data", None), "source", None) == "digits":
            assert len(load_data(made.data, 0).train.count) == made.data.num_clients
    else:
        assert (ROOT / words[0]).exists()


def test_links_exist():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
