"""Laws of options: a signature and its docstring are all that a command line needs."""

import dataclasses
import functools
import json
import subprocess
import sys
from typing import Any, ClassVar, Literal

import pytest
from absl import flags

from jaxfm import config as configs
from jaxfm.config import check, from_dict, option, override, section, to_dict
from jaxfm.options import (
    argument_docs,
    arguments,
    chosen_options,
    options_config,
    options_of,
    with_options,
)


def plain(model, task):
    """Trains plainly."""


def prune(
    model, task, hidden: int = 3, *, keep: float = 0.5, kind: Literal["hard", "soft"] = "hard",
    widths: tuple[int, ...] = (1, 2), limit: int | None = None, published: bool = False,
    name: str = "p", score: Any = None, path: "list[int] | None" = None,
) -> None:  # fmt: skip
    """Prunes in rounds.

    The rest of the docstring is not shown.

    Args:
      model: what is pruned.
      keep: share of the channels: those that stay,
        rounded up. At least one stays.
      kind, limit: of two parameters.
      widths: of the layers.

      published: as in the paper.
    Raises:
      name: this is no argument.
    """


def distill(model, *, steps: int, temperature: float = 2.0):
    """Distills.

    Args:
      steps: of training
    """


RETIRED = {"keep": ("prune.keep", "other.keep"), "steps": "distill.steps", "old.a": "prune.widths"}


@with_options(
    "algorithm", {name.__name__: options_config(name) for name in (plain, prune, distill)}
)
@dataclasses.dataclass(frozen=True)
class Config:
    """A run."""

    retired: ClassVar = RETIRED

    algorithm: str = option("plain", "how the model is trained")
    rounds: int = option(10, "rounds of training")

    def __post_init__(self):
        check(self)
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds}: give at least 1.")


def parse(*words: str):
    values = flags.FlagValues()
    configs.define_flags(Config, values)
    values(["script", *words])
    return configs.from_flags(Config, values)


def test_options_are_the_keyword_only_parameters_of_plain_types():
    options = {option.name: option for option in options_of(prune)}
    assert list(options) == ["keep", "kind", "widths", "limit", "published", "name"]
    assert (
        options["keep"].help
        == "share of the channels: those that stay, rounded up. At least one stays"
    )
    assert options["kind"].help == options["limit"].help == "of two parameters"
    assert options["published"].help == "as in the paper"
    assert options["name"].help == ""
    assert options["limit"].annotation == int | None and options["widths"].default == (1, 2)
    assert options_of(plain) == ()
    assert next(option.name for option in options_of(prune, skip=("keep", "kind"))) == "widths"
    assert options_of(distill)[0].default is dataclasses.MISSING
    assert set(argument_docs(prune)) == {"model", "keep", "kind", "limit", "widths", "published"}


def test_partials_and_wrappers_keep_the_docstring():
    @functools.wraps(prune)
    def wrapped(*args, **kwargs):
        return prune(*args, **kwargs)

    assert options_of(wrapped) == options_of(prune)
    bound = options_of(functools.partial(prune, keep=0.25))
    assert bound[0] == options_of(prune)[0]._replace(default=0.25)


def test_an_options_config_holds_the_functions_defaults():
    made = options_config(prune, defaults={"keep": 0.75}, skip=("name",))
    assert made.__name__ == "prune" and made.__doc__ == "Prunes in rounds."
    assert arguments(made()) == {
        "keep": 0.75, "kind": "hard", "widths": (1, 2), "limit": None, "published": False,
    }  # fmt: skip
    assert made(keep=1).keep == 1.0 and made(widths=[3]).widths == (3,)
    with pytest.raises(TypeError, match=r"keep='much' is of type str; wanted: float\."):
        made(keep="much")
    with pytest.raises(ValueError, match=r"prune has no parameter 'kept' to skip\."):
        options_of(prune, skip=("kept",))
    with pytest.raises(ValueError, match=r"prune has no option 'score' to set a default of\."):
        options_config(prune, defaults={"score": 1})


def test_a_required_option_is_shown_and_missed():
    missing = override(Config(), "algorithm=distill")
    with pytest.raises(ValueError, match=r"distill\.steps must be given: of training\."):
        chosen_options(missing, "algorithm")
    assert chosen_options(override(missing, "distill.steps=1e2"), "algorithm") == {
        "steps": 100, "temperature": 2.0,
    }  # fmt: skip
    assert "--distill.steps=required  (int)" in configs.describe(Config)


def test_flags_give_the_arguments_of_the_chosen_function():
    assert chosen_options(parse(), "algorithm") == {}
    config = parse(
        "--algorithm=prune", "--prune.keep=0.25", "--prune.widths=3,4", "--prune.published"
    )
    assert chosen_options(config, "algorithm") == {
        "keep": 0.25, "kind": "hard", "widths": (3, 4), "limit": None, "published": True,
        "name": "p",
    }  # fmt: skip
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config
    assert dataclasses.replace(config, rounds=3).rounds == 3
    assert isinstance(config, Config)


def test_the_choice_is_one_of_the_names():
    with pytest.raises(ValueError, match=r"algorithm='prun' is not a choice\. Did you mean prune"):
        Config(algorithm="prun")
    with pytest.raises(ValueError, match=r"rounds=0: give at least 1"):
        Config(rounds=0)


def test_flags_of_what_is_not_chosen_are_refused():
    with pytest.raises(ValueError, match=r"^--prune\.keep requires --algorithm=prune\.$"):
        parse("--prune.keep=0.5")
    with pytest.raises(ValueError, match=r"^--prune\.keep requires --algorithm=prune\.$"):
        parse("--algorithm=distill", "--prune.keep=0.5")


def test_a_section_may_depend_on_several_fields_and_values():
    @dataclasses.dataclass(frozen=True)
    class Options:
        share: float = option(0.5, "share")

    @dataclasses.dataclass(frozen=True)
    class Many:
        algorithm: str = option("a", "one")
        compare: tuple[str, ...] = option((), "several")
        shared: Options = section(Options(), ("algorithm", "compare"), ("b", "c"))

    Outer = dataclasses.make_dataclass("Outer", [("many", Many, Many())], frozen=True)

    values = flags.FlagValues()
    configs.define_flags(Many, values)
    values(["script", "--compare=a,c", "--shared.share=1"])
    assert configs.from_flags(Many, values).shared.share == 1.0
    values = flags.FlagValues()
    configs.define_flags(Outer, values)
    values(["script", "--many.shared.share=1"])
    with pytest.raises(ValueError, match=r"requires --many.algorithm=b or --many.algorithm=c or "):
        configs.from_flags(Outer, values)


def test_help_shows_the_options_of_the_choice():
    everything = configs.describe(Config)
    for part in ("prune: Prunes in rounds.", "distill: Distills.", "--algorithm=plain  (plain | "):
        assert part in everything
    assert "--prune=X" not in everything and "--help=all" not in everything
    shown = configs.describe(Config, choices=Config(algorithm="prune"))
    assert "--prune.keep=0.5  (float)\n      share of the channels" in shown
    assert "--distill.steps" not in shown
    assert "--help=all shows the options of distill, too." in shown


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("keep", "keep is now prune.keep or other.keep."),
        ("steps", "steps is now distill.steps."),
        ("old.a", "old.a is now prune.widths."),
    ],
)
def test_a_retired_name_is_answered_with_the_new_one(name, message):
    with pytest.raises(ValueError) as error:
        override(Config(), f"{name}=1")
    assert str(error.value) == message
    head, *rest = name.split(".")
    with pytest.raises(ValueError, match="is now"):
        from_dict(Config, {head: {rest[0]: 1} if rest else 1})


SCRIPT = """
import os, sys
from test_options import Config
from jaxfm.config import run
for line in sys.stdin:  # each in its own process, but imported once
    if not os.fork():
        sys.argv[1:] = line.split()
        os.dup2(1, 2)
        run(lambda config: print(config), Config)
    os.wait()
    print("next", flush=True)
"""


def test_a_script_with_options(tmp_path):
    path, saved = tmp_path / "script.py", tmp_path / "config.json"
    path.write_text(SCRIPT)
    saved.write_text(json.dumps({"algorithm": "distill"}))
    lines = ["--help", "--algorithm prune --rounds=x --help", f"--help --config={saved}",
             "--help=all", "--keep=0.5", "--prune.keep=0.5"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(path)], input="\n".join(lines), text=True, check=True,
        capture_output=True, env={"PYTHONPATH": __file__.rpartition("/")[0]},
    )  # fmt: skip
    *printed, _ = done.stdout.split("next\n")
    shown = [[f"--{name}." in out for name in ("prune", "distill")] for out in printed[:4]]
    assert shown == [[False, False], [True, False], [False, True], [True, True]]
    assert "error: --keep is now --prune.keep or --other.keep.\nTry --help." in printed[4]
    assert "error: --prune.keep requires --algorithm=prune." in printed[5]
