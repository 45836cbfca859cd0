"""What a script answers to a malformed command, found in this process and without any training."""

import contextlib
import io

from absl import flags

from jaxfm.config import define_flags, read_command
from jaxfm.errors import explain
from jaxfm.federated import run as federated_run
from jaxfm.launch import demo, federate, generate, pretrain, report, search, simulate, supernet
from jaxfm.launch.federate_config import FederateConfig

SCRIPTS = {
    "demo": (demo.main, demo.DemoConfig),
    "federate": (federate.main, FederateConfig),
    "generate": (generate.main, generate.GenerateConfig),
    "pretrain": (pretrain.main, pretrain.PretrainConfig),
    "report": (report.main, report.ReportConfig),
    "search": (search.main, search.SearchConfig),
    "simulate": (simulate.main, simulate.SimulateConfig),
    "supernet": (supernet.main, supernet.SupernetConfig),
}


def no_training(monkeypatch):
    """Makes the beginning of any training an error that no library has."""

    def begins(*_, **__):
        raise AssertionError("It began to train.")

    monkeypatch.setattr(federated_run, "compile_rounds", begins)
    monkeypatch.setattr(pretrain, "train_steps", begins)
    monkeypatch.setattr(supernet, "train_steps", begins)
    monkeypatch.setattr(search.search, "fine_tuner", begins)
    monkeypatch.setattr(search.search, "select_units", begins)


def answer(script, words):
    """The sentence and the exit status of a command; ("", 0) where it succeeds."""
    main, config = SCRIPTS[script]
    values = flags.FlagValues()
    define_flags(config, values)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            main(read_command(config, [script, *words], values))
    except Exception as error:
        return explain(error)
    return "", 0


def check_refused(script, command, says):
    """Asserts that a command gets one sentence of the library's own, which says a text."""
    sentence, status = answer(script, command.split() if isinstance(command, str) else command)
    assert status == 2, sentence
    assert "--traceback" not in sentence, sentence  # explain names what others raise
    assert len(sentence.splitlines()) == 1, sentence
    assert sentence.endswith((".", "?")), sentence
    assert says in sentence, sentence
