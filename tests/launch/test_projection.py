"""A projection is arithmetic on what XLA counts: closed forms, limits, and refusals."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import flags as absl_flags

from jaxfm.config import define_flags, read_command
from jaxfm.cost import count_flops, num_bytes
from jaxfm.federated import Local, fed_avg
from jaxfm.launch.cluster.project import ProjectConfig, project
from jaxfm.launch.cluster.project_page import page
from jaxfm.launch.cluster.render import flags_of
from jaxfm.launch.cluster.workloads import (
    Training,
    Workload,
    compiled_program,
    data_parallel,
    rounds_work,
    stage_decoding,
    step_program,
    tensor_decoding,
    tick_program,
)
from jaxfm.models import mlp
from jaxfm.parallel.simulation.machines import MACHINES, Machine, machine_named, shared
from jaxfm.parallel.simulation.programs import Collective, Program, read_collectives
from jaxfm.parallel.simulation.roofline import Assumptions, Piece, exchange_s, time_of
from jaxfm.report.page import render
from jaxfm.tasks import classification
from jaxfm.testing import tiny_decoder

PLAIN = Assumptions("float32", latency_s=0.0)
BOX = Machine("box", 8e9, 4e9, 1e9, 1e9, 4, 1e8, 1e7, "made up")
SIZES, BATCH = (64, 96, 10), 32


def training() -> Training:
    examples = {
        "image": np.zeros((BATCH, SIZES[0]), np.float32), "label": np.zeros(BATCH, np.int32)
    }  # fmt: skip
    return Training(mlp(SIZES), classification(SIZES[-1]), optax.sgd(0.1), examples)


@pytest.fixture(scope="module")
def rounds() -> Workload:
    work = training()
    algorithm = fed_avg(work.model, work.task, Local(work.optimizer, BATCH))
    return rounds_work(
        algorithm, work, clients=3, steps=5, amount=3.0, unit="clients", name="rounds"
    )


def seconds(pieces, devices=1, assumed=PLAIN, machine=BOX):
    return time_of(pieces, machine, devices, assumed)


@pytest.mark.parametrize("devices", [2, 3, 4])
def test_an_all_reduce_is_a_ring_step_by_step(devices):
    """Every device sends one part of n to the next, n - 1 times to add up and n - 1 to spread."""
    nbytes, sent = 12e6, 0.0
    for _ in ("add up", "spread"):
        for _ in range(devices - 1):
            sent += nbytes / devices
    found = exchange_s(Collective("all-reduce", nbytes), BOX, devices, 0.0)
    np.testing.assert_allclose(found, sent / 1e8, rtol=1e-12)


def test_an_exchange_goes_over_the_slowest_link_and_each_message_takes_its_time():
    one = Collective("all-reduce", 1e6)
    within, beyond = (exchange_s(one, BOX, n, 0.0) for n in (4, 8))
    np.testing.assert_allclose(beyond / within, 10 * (7 / 8) / (3 / 4), rtol=1e-12)
    late = exchange_s(one, BOX, 8, 1e-3) - exchange_s(one, BOX, 8, 0.0)
    np.testing.assert_allclose(late, 2 * 3 * 1e-3, rtol=1e-9)  # up and down a tree of depth 3
    pieces = [exchange_s(Collective(kind, 1e6), BOX, 8, 1e-3)
              for kind in ("reduce-scatter", "all-gather")]  # fmt: skip
    np.testing.assert_allclose(sum(pieces), exchange_s(one, BOX, 8, 1e-3), rtol=1e-12)


@pytest.mark.parametrize(("rows", "bound"), [(2, "memory"), (512, "compute")])
def test_a_product_takes_the_longer_of_its_operations_and_its_bytes(rows, bound):
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows, 64), (64, 64)))
    time = seconds([Piece(compiled_program(jnp.matmul, x, w))])
    flops, nbytes = 2 * rows * 64 * 64, 4 * (2 * rows * 64 + 64 * 64)
    np.testing.assert_allclose(time.compute, flops / 4e9, rtol=1e-6)
    np.testing.assert_allclose(time.memory, nbytes / 1e9, rtol=1e-6)
    assert (bound == "memory") == (time.memory > time.compute)
    assert time.total == max(time.compute, time.memory)


def test_a_round_has_the_operations_of_its_clients_steps(rounds):
    """A step of an MLP: twice its products for the loss, as much for each weight's gradient, and
    for each hidden activation's."""
    first, second = SIZES[0] * SIZES[1], SIZES[1] * SIZES[2]
    step = 2 * BATCH * ((first + second) + (first + second) + second)
    work = training()
    loss = lambda params, x, y: work.task.loss(
        work.model.apply(variables._replace(params=params), x)[0], y, jnp.ones(BATCH)
    )[0]
    variables = jax.eval_shape(work.model.init, jax.random.key(0))
    x, y = work.examples["image"], work.examples["label"]
    assert count_flops(jax.grad(loss), variables.params, x, y) == step
    flops = sum(piece.times * piece.program.flops for piece in rounds.pieces(2))
    # Besides products: the softmax, the update of each weight, sums of models and shuffles.
    assert 15 * step < flops < 1.1 * 15 * step


def test_a_round_exchanges_the_model_once_and_a_step_its_gradient(rounds):
    work = training()
    model = num_bytes(jax.eval_shape(work.model.init, jax.random.key(0)).params)
    sent = lambda pieces, kind: sum(
        piece.times * c.nbytes
        for piece in pieces for c in piece.program.collectives if c.kind == kind
    )  # fmt: skip
    assert model <= sent(rounds.pieces(2), "all-reduce") <= model + 64  # and a few counts
    gradient = sent(data_parallel(work, 1.0, "rows").pieces(2), "all-reduce")
    assert model <= gradient <= model + 64
    reports = [sent(rounds.pieces(n), "all-gather") for n in (2, 8)]
    assert reports[1] == 4 * reports[0] > 0  # one of each client


def test_layers_apart_are_all_counted():
    shallow, deep = (
        tick_program(tiny_decoder(num_layers=n), batch=2, cells=8).flops for n in (1, 3)
    )
    one = 2 * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24) * 2  # q, k and v, o and the MLP
    assert deep - shallow >= 2 * one
    np.testing.assert_allclose(deep - shallow, 2 * one, rtol=0.5)


def test_devices_that_share_a_model_do_its_work_together():
    model = tiny_decoder()
    alone = tensor_decoding(model, 2, 8, 1).pieces(1)[0].program
    pair = tensor_decoding(model, 2, 8, 2).pieces(2)[0].program
    assert alone.collectives == () and pair.collectives
    assert alone.flops / 2 <= pair.flops < alone.flops
    stages = stage_decoding(model, 2, 8, 2, 16)
    share = stages.pieces(2)[0].program
    assert share.flops == alone.flops / 2
    assert share.collectives == (Collective("collective-permute", 4 * 2 * 16),)
    assert 2 * stages.amount == 2


@pytest.mark.parametrize("overlap", [0.0, 0.5, 1.0])
def test_limits(rounds, overlap):
    assumed = Assumptions("float32", 1e-6, overlap)
    alone = seconds(rounds.pieces(1), 1, assumed)
    assert alone.collectives == 0 and alone.total == alone.device
    last = 0.0
    for devices in (1, 2, 4, 8, 64, 4096):
        time = seconds(rounds.pieces(devices), devices, assumed)
        terms = (time.compute, time.memory, time.device, time.collectives)
        assert time.total >= max(terms) * (1 - 1e-12)
        assert time.total <= time.device + time.collectives
        assert time.total >= last  # weak scaling: more devices never make a round shorter
        last = time.total
    hidden = seconds(rounds.pieces(8), 8, assumed._replace(overlap=1.0)).total
    assert hidden <= seconds(rounds.pieces(8), 8, assumed).total


def test_slower_programs_narrower_numbers_and_shared_cores():
    piece = [Piece(Program(4e9, 1e9, (Collective("all-reduce", 1e8),)), 2.0)]
    full = seconds(piece, 2)
    assert full.compute == full.memory == 2.0 and full.collectives == 2.0
    half = seconds(piece, 2, PLAIN._replace(efficiency=0.5))
    assert (half.compute, half.memory, half.collectives) == (4.0, 4.0, 2.0)
    narrow = seconds(piece, 2, PLAIN._replace(dtype="bfloat16"))
    assert (narrow.compute, narrow.memory, narrow.collectives) == (1.0, 1.0, 1.0)
    slow = seconds(piece, 4, machine=shared(BOX, 4, 2))
    assert slow.device == 2 * full.device
    assert shared(BOX, 1, 2) == BOX


def test_exchanges_are_read_from_the_text():
    text = (
        "ENTRY %main (p: f32[8]) -> f32[8] {\n"
        "  %r = (f32[8,2]{1,0}, bf16[], pred[3]{0}) all-reduce(%a, %b, %c), replica_groups={}\n"
        "  %g = s8[4]{0} all-gather(%all-reduce.1), dimensions={0}\n}\n"
    )
    assert read_collectives(text) == (Collective("all-reduce", 69), Collective("all-gather", 4))
    with pytest.raises(ValueError, match=r"a collective \(all-reduce\) in a loop .*\.$"):
        read_collectives(text.replace("ENTRY %main", "%body"))


def test_points_and_page(rounds):
    """Scaling is told from one device, or from the fewest that hold a copy of the model."""
    config = ProjectConfig(machines=("h100", "v5e"), most=64, report="none.html")
    assert config.counts == [1, 2, 4, 8, 16, 32, 64]
    assert ProjectConfig(most=5).counts == [1, 2, 4]
    copies = Workload("copies", "tokens", 2.0, lambda n: (Piece(Program(1e9, 1.0)),), 4)
    points = [
        point
        for work in (rounds, copies)
        for name in config.machines
        for point in project(work, machine_named(name), config.counts, config.assumed)
    ]
    assert [p.devices for p in points if p.workload == "copies"] == [4, 8, 16, 32, 64] * 2
    for point in points:
        if point.workload == "copies":
            assert math.isclose(point.efficiency, 1.0)
            assert math.isclose(point.rate, 2 * point.devices / point.time.total)
    small = [p.efficiency for p in points if (p.workload, p.machine) == ("rounds", "h100")]
    assert small[0] == 1.0 and small == sorted(small, reverse=True) and small[-1] < 0.9
    html = render(page(config, [rounds, copies], points))
    for words in ("Rounds", "Copies", "NVIDIA H100 data sheet", "not checked", "5 µs"):
        assert words in html


def test_the_table_of_machines_is_whole():
    for name, machine in MACHINES.items():
        assert machine.name == name and machine.source
        figures = [x for x in machine if isinstance(x, float | int)]
        assert min(figures) > 0
        assert machine.bfloat16 > machine.float32 and machine.near_link > machine.far_link


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--machines=h100,b100", "machine='b100' is not in the table.*h100"),
        ("--machines=", "machines is empty: give some of a100"),
        ("--most=0", "most=0: give at least 1"),
        ("--most=2000000", "most=2000000: give at most"),
        ("--dtype=float8", "dtype='float8'"),
        ("--latency_us=-1", "latency_us=-1.0: give a time"),
        ("--latency_us=nan", "latency_us=nan: give a time"),
        ("--overlap=2", "overlap=2.0: give a share between 0 and 1"),
        ("--efficiency=0", "efficiency=0.0: give a share above 0"),
        ("--split=3", "split=3: give a power of two that divides num_heads=8"),
        ("--num_layers=6", "split=4 does not divide num_layers=6"),
        ("--embed_dim=40", "even head_dim, got 5"),
        ("--steps=0", "steps=0: give at least 1"),
        ("--report=.", "is a folder"),
        ("--machine=h100", "Unknown flag --machine. Did you mean --machines"),
    ],
)
def test_bad_values_are_refused_in_one_sentence(flag, says):
    values = absl_flags.FlagValues()
    define_flags(ProjectConfig, values)
    with pytest.raises(ValueError, match=says) as error:
        read_command(ProjectConfig, ["project", flag], values)
    assert str(error.value).endswith((".", "?"))


def test_what_cannot_be_projected_says_why(rounds):
    work = training()
    algorithm = fed_avg(work.model, work.task, Local(work.optimizer, BATCH))
    with pytest.raises(ValueError, match="steps=0: give at least 1"):
        rounds_work(algorithm, work, clients=1, steps=0, amount=1, unit="", name="")
    with pytest.raises(ValueError, match="2 sizes of models"):
        two = algorithm._replace(buckets=algorithm.buckets * 2)
        rounds_work(two, work, clients=1, steps=1, amount=1, unit="", name="")
    with pytest.raises(ValueError, match="devices=0"):
        seconds(rounds.pieces(1), 0)
    with pytest.raises(ValueError, match="overlap=-1"):
        seconds(rounds.pieces(1), 1, PLAIN._replace(overlap=-1))
    with pytest.raises(ValueError, match="or project"):
        flags_of(["projects"])


def test_settings_and_step_agree():
    assert dataclasses.replace(ProjectConfig(), overlap=0.5).assumed.overlap == 0.5
    assert step_program(training()).collectives == ()
