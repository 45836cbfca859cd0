"""The report of a projection: curves, what bounds them, the machines, and every assumption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxfm import config as configs
from jaxfm.parallel.simulation.machines import machine_named
from jaxfm.report import Report, heading, json_panel, line_plot, paragraph, row, table

ASSUMPTIONS = (
    "Times are bounds: each program takes the longer of its operations at the peak of the data "
    "sheet and its bytes at the full bandwidth, divided by the efficiency ({efficiency:g}).",
    "Operations, bytes and exchanges are XLA's own counts of programs compiled for a CPU in "
    "float32. An accelerator's compiler fuses more, and would move fewer bytes.",
    "In {dtype} each array has {bytes} bytes a number, optimizer state and activations included; "
    "who keeps 32 bits of some moves more.",
    "An all-reduce sends 2 (n - 1) / n of its bytes over the slowest link on the way and takes 2 "
    "ceil(log2 n) messages of {latency_us:g} µs; a gather sends (n - 1) / n in ceil(log2 n). The "
    "slowest link is the one between nodes (of TPUs: slices) as soon as n exceeds one of them; an "
    "algorithm of two levels would do better.",
    "Exchanges are hidden under {overlap:.0%} of a device's own time.",
    "All devices are equally fast, none waits for a straggler, none fails, and the network has the "
    "same bandwidth between any two nodes. Reading data, saving and evaluation take no time.",
    "Scaling is weak: each device has its own batch, or its own clients, however many devices "
    "there are. Large batches and many clients are worth less each; that is not counted.",
    "A round's clients run one after another, each with all its steps; drawing a cohort takes the "
    "time that it takes for two clients. Clients' memories stay on their devices.",
    "Decoding counts ticks of full batches whose caches are read whole; prompts take no time. With "
    "stages, the model is cut evenly and as many batches are under way as there are stages.",
    "Whether a model, its optimizer and its caches fit into the memory is not checked.",
)


def page(config: Any, works: Sequence[Any], points: Sequence[Any]) -> Report:
    """The report.

    Args:
      config: a `ProjectConfig`.
      works: its workloads.
      points: of `project`, in the order of workloads and machines.
    """
    parts = []
    for work in works:
        own = [point for point in points if point.workload == work.name]
        if own:
            parts += _workload(work, own)
    numbers = {"bytes": 2 if config.dtype == "bfloat16" else 4, **configs.to_dict(config)}
    parts += [
        heading("The machines", "Peaks of data sheets; links are what a device sends at a time."),
        _machines(config),
        heading("What is assumed"),
        *(paragraph(text.format(**numbers)) for text in ASSUMPTIONS),
        json_panel("Config", configs.to_dict(config)),
    ]
    sizes = f"{config.num_layers} layers of width {config.embed_dim}"
    return Report(
        "Projection onto a cluster",
        f"A decoder of {sizes} on up to {config.counts[-1]:,} devices; not measured there.",
        tuple(parts),
    )


def _workload(work: Any, points: Sequence[Any]) -> list:
    """Curves of the rate and of scaling, and what bounds the largest cluster."""
    machines = list(dict.fromkeys(point.machine for point in points))
    of = lambda name: [point for point in points if point.machine == name]
    curves = lambda read: {
        name: ([p.devices for p in of(name)], [read(p) for p in of(name)]) for name in machines
    }
    whole = work.pieces(points[0].devices)
    flops = sum(piece.times * piece.program.flops for piece in whole)
    nbytes = sum(piece.times * piece.program.nbytes for piece in whole)
    sent = sum(c.nbytes for piece in whole for c in piece.program.collectives)
    rows = [
        [
            p.machine, p.devices, p.rate, 1e3 * p.time.total, 1e3 * p.time.compute,
            1e3 * p.time.memory, 1e3 * p.time.collectives, f"{p.efficiency:.1%}", p.bound,
        ]
        for name in machines
        for p in (of(name)[0], of(name)[-1])
    ]  # fmt: skip
    columns = ["machine", "devices", f"{work.unit}/s", "ms", "ms compute", "ms memory",
               "ms exchange", "of linear", "bound by"]  # fmt: skip
    return [
        heading(
            work.name[0].upper() + work.name[1:],
            f"A device does {flops:.3g} operations, moves {nbytes:.3g} bytes (in float32) and "
            f"exchanges {sent:.3g} for {work.amount:,g} {work.unit}.",
        ),
        row(
            line_plot(curves(lambda p: p.rate), x_label="devices", y_label=f"{work.unit}/s",
                      log_x=True, log_y=True),
            line_plot(curves(lambda p: 100 * p.efficiency), x_label="devices",
                      y_label="% of linear scaling", log_x=True),
        ),
        table(columns, rows),
    ]  # fmt: skip


def _machines(config: Any) -> Any:
    rows = [
        [
            m.name, m.bfloat16 / 1e12, m.float32 / 1e12, m.memory / 1e9, m.capacity / 1e9, m.near,
            m.near_link / 1e9, m.far_link / 1e9, m.source,
        ]
        for m in map(machine_named, config.machines)
    ]  # fmt: skip
    columns = ["machine", "bf16 TFLOP/s", "f32 TFLOP/s", "memory GB/s", "GB", "devices a node",
               "link in it GB/s", "link beyond GB/s", "source"]  # fmt: skip
    return table(columns, rows)
