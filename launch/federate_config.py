"""The config of a federated run, with a section of options for every registered algorithm."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from jaxfm.config import check, check_whole, option
from jaxfm.federated import DEVICES, fleet
from jaxfm.federated.foundation.phases import behind, phases_of
from jaxfm.federated.registry import entries, find
from jaxfm.launch.adapters import AdapterConfig
from jaxfm.launch.clock import AsynchronousConfig
from jaxfm.launch.optimizers import OptimizerConfig
from jaxfm.launch.privacy import ExamplesConfig, PrivateConfig
from jaxfm.launch.setup import DataConfig, ModelConfig
from jaxfm.launch.wrapping import RobustConfig, SecureConfig
from jaxfm.options import config_of, with_options
from jaxfm.run_folder import RUN_DIR_HELP

_LEAST = {
    "rounds": 1, "cohort_size": 1, "batch_size": 1, "microbatch": 0, "epochs": 1, "max_steps": 0,
    "eval_every": 1, "eval_examples": 0, "test_examples": 0, "seeds": 1, "clients_at_once": 0,
    "tensor": 1, "deadline_s": 0, "seed": 0, "quorum": 0, "byte_budget": 0, "central_batch": 0,
}  # fmt: skip


_DEFAULT_TOP_K = 0.1
_DEFAULT_ROUNDS = 60
_DEFAULT_TIERS = (1.0, 0.5, 0.25)


@dataclasses.dataclass(frozen=True)
class _FederateConfig:
    """A federated run."""

    run_dir: str = option("", RUN_DIR_HELP)
    algorithm: str = option("fed_avg", "of the registry, or a .py file that registers one")
    init: str = option(
        "",
        "folder of a model that the run starts from, such as model/ of another; as --model=FOLDER",
    )
    compare: tuple[str, ...] = option((), "several algorithms, side by side on the same data")
    seeds: int = option(1, "runs of each algorithm in a comparison, with seeds from --seed on")
    rounds: int = option(_DEFAULT_ROUNDS, "rounds in all")
    phases: tuple[str, ...] = option(
        (),
        "a schedule in the place of rounds: central:STEPS on the server's public rows "
        "(--data.public) and federated:ROUNDS, such as central:200,federated:30,central:50",
    )
    central_batch: int = option(
        0, "rows of a central step; 0: as many as a local step of all clients of a round takes"
    )
    cohort_size: int = option(8, "clients drawn a round")
    batch_size: int = option(8, "examples of a local step")
    microbatch: int = option(
        0, "rows of a step in memory at a time, to the same result; 0: all of them"
    )
    epochs: int = option(1, "local epochs a round")
    max_steps: int = option(
        8, "most local steps a round, which end its epochs early; 0: as many as the epochs take"
    )
    drop_rate: float = option(0.0, "probability that a drawn client fails to report")
    tiers: tuple[float, ...] = option(
        _DEFAULT_TIERS,
        "share of each width that the clients of a tier hold, for algorithms with unequal clients",
    )
    profile: tuple[str, ...] = option(
        (),
        f"clients' machines, dealt out in turn, whose time is simulated: {', '.join(DEVICES)}",
    )
    deadline_s: float = option(
        0.0,
        "simulated seconds of a round on a --profile, to which models and steps are fitted; 0: as "
        "long as half of the clients need for the largest model that they can hold, if no steps of "
        "the others are cut by it; inf: memory alone decides",
    )
    upload: Literal["full", "8bit", "4bit", "2bit", "top_k", "sparse"] = option(
        "full",
        "how uploads travel: floats; randomly rounded; only the largest, in 8 bits; or only the "
        "largest of each 4,096, in 2 bits",
    )
    top_k: float = option(
        _DEFAULT_TOP_K, "upload=top_k, sparse: share of the entries of each array that travel"
    )
    download: Literal["full", "8bit", "4bit"] = option("full", "how downloads travel")
    quorum: int = option(0, "reports that a round needs to count; 0: any number")
    byte_budget: int = option(
        0,
        "bytes of all uploads and downloads together, which the run never exceeds: it ends before "
        "a round that may; 0: no budget",
    )
    eval_every: int = option(5, "rounds between evaluations, and checkpoints at most")
    eval_examples: int = option(512, "validation rows looked at while training; 0: all")
    test_examples: int = option(0, "test rows looked at in the end; 0: all")
    log_to: tuple[Literal["wandb", "mlflow"], ...] = option(
        (), "services that get the metrics, too: wandb, mlflow"
    )
    export: bool = option(
        False, "also write what each tier has trained into export/, for jaxfm.hub and for devices"
    )
    clients_at_once: int = option(0, "clients side by side on a device; 0: chosen per backend")
    tensor: int = option(1, "devices that hold one client's model together, by its heads and MLPs")
    seed: int = option(0, "of data, parameters and rounds")
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    local: OptimizerConfig = OptimizerConfig()
    robust: RobustConfig = RobustConfig()
    private: PrivateConfig = PrivateConfig()
    examples: ExamplesConfig = ExamplesConfig()
    secure: SecureConfig = SecureConfig()
    asynchronous: AsynchronousConfig = AsynchronousConfig()

    retired: ClassVar[dict[str, Any]] = {
        "cohort": "cohort_size",
        "mu": "fed_prox.mu",
        "server_learning_rate": ("fed_adam.learning_rate", "fed_yogi.learning_rate"),
        "server_momentum": "fed_avg_m.momentum",
        "keep": ("spatl.keep", "adp.keep"),
        "select": "spatl.select",
        "policy": "spatl.policy",
        "fed_dyn_alpha": "fed_dyn.alpha",
        "threshold": "fed_dp.threshold",
        "distil.steps": ("fed_df.distill_steps", "fed_kemf.distill_steps", "rafl.distill_steps"),
        "distil.batch_size": ("fed_kemf.distill_batch_size", "rafl.distill_batch_size"),
        "distil.learning_rate": ("fed_kemf.distill_learning_rate", "rafl.distill_learning_rate"),
        "distil.temperature": ("fed_kemf.distill_temperature", "rafl.distill_temperature"),
        "distil.vote": ("fed_df.vote", "fed_kemf.vote", "rafl.vote"),
    }

    def __post_init__(self):
        check(self)
        self._start_from(self.init)
        check_whole(self, _LEAST)
        if not 0 <= self.drop_rate < 1:
            raise ValueError(f"drop_rate={self.drop_rate}: give a probability from 0 and below 1.")
        if not 0 < self.top_k <= 1:
            raise ValueError(f"top_k={self.top_k}: give a share above 0 and up to 1.")
        if self.cohort_size > self.data.num_clients:
            raise ValueError(
                f"cohort_size={self.cohort_size}: there are only "
                f"data.num_clients={self.data.num_clients}."
            )
        self._check_phases()
        self._check_clock()
        if self.tensor > 1 and (self.phases or self.asynchronous.buffer):
            other = "phases" if self.phases else "asynchronous"
            raise ValueError(
                f"tensor={self.tensor}: --{other} runs a client on one device; leave out one of "
                "the two."
            )
        if self.quorum > self.cohort_size:
            raise ValueError(
                f"quorum={self.quorum}: a round has only cohort_size={self.cohort_size} clients."
            )
        if self.upload not in ("top_k", "sparse") and self.top_k != _DEFAULT_TOP_K:
            raise ValueError(
                f"top_k={self.top_k} changes nothing: give --upload=top_k or sparse, too."
            )
        if self.seeds > 1 and not self.compare:
            raise ValueError(f"seeds={self.seeds} changes nothing without --compare; give --seed.")
        if not self.tiers or any(not 0 < tier <= 1 for tier in self.tiers):
            raise ValueError(f"tiers={self.tiers}: give shares of the width, above 0 and up to 1.")
        names = self.compare or (self.algorithm,)
        if self.tiers != _DEFAULT_TIERS and not any(find(name).has_tiers for name in names):
            tiered = [name for name, entry in entries().items() if entry.has_tiers]
            raise ValueError(
                f"tiers={self.tiers} changes nothing with {', '.join(names)}, whose clients train "
                f"models of one size; {', '.join(tiered)} have tiers."
            )
        if self.profile:
            fleet(self.profile, 1)  # raises for unknown names
        elif self.deadline_s:
            raise ValueError(f"deadline_s={self.deadline_s} requires --profile.")
        for name in self.compare or (self.algorithm,):
            options = getattr(self, name, None)
            if getattr(options, "select", "") == "agent" and not self.data.local_validation:
                raise ValueError(
                    f"{name}.select=agent judges by validation rows: give --data.local_validation."
                )

    def _check_phases(self) -> None:
        """Refuses schedules that cannot be run; the rounds are those of the schedule."""
        if not self.phases:
            if self.central_batch:
                raise ValueError(f"central_batch={self.central_batch} requires --phases.")
            return
        rounds, steps = behind(phases_of(self.phases))
        if self.rounds not in (_DEFAULT_ROUNDS, rounds):
            raise ValueError(
                f"rounds={self.rounds} with phases={','.join(self.phases)}, which have {rounds}; "
                "leave out --rounds."
            )
        if not rounds:
            raise ValueError(
                f"phases={','.join(self.phases)} have no federated phase; jaxfm.launch.pretrain "
                "trains in one place."
            )
        if steps and not self.data.public:
            raise ValueError(
                f"phases={','.join(self.phases)}: central phases train on the server's public "
                "rows; give --data.public=0.2, a share of the training rows."
            )
        object.__setattr__(self, "rounds", rounds)

    def _check_clock(self) -> None:
        """Refuses what does not go with steps by a clock."""
        if not self.asynchronous.buffer:
            return
        if not self.profile:
            raise ValueError(
                "asynchronous steps come as fast as clients' machines; give --profile, such as "
                "--profile=pi,phone,laptop."
            )
        for name in ("drop_rate", "deadline_s", "byte_budget", "phases", "quorum"):
            if value := getattr(self, name):
                raise ValueError(
                    f"{name}={value} is of rounds that wait, and --asynchronous has none."
                )
        if self.asynchronous.buffer > self.data.num_clients:
            raise ValueError(
                f"asynchronous.buffer={self.asynchronous.buffer}: there are only "
                f"data.num_clients={self.data.num_clients}."
            )

    def _start_from(self, folder: str) -> None:
        """Makes the folder of `init` the model's."""
        if not folder:
            return
        if self.model.family not in ("auto", folder):
            raise ValueError(
                f"init={folder!r} brings its own model; leave out --model={self.model.family}."
            )
        object.__setattr__(self, "model", dataclasses.replace(self.model, family=folder))


def federate_config() -> type:
    """The config of a run, with a section of options for every registered algorithm."""
    sections = {
        name: config_of(name, entry.options, (entry.factory.__doc__ or name).splitlines()[0])
        for name, entry in entries().items()
    }
    return with_options(("algorithm", "compare"), sections)(_FederateConfig)


FederateConfig: Any = federate_config()
