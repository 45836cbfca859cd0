"""How slow links and wrong drafts tell on each way of decoding, simulated; writes two pictures.

    python benchmarks/pipe_links.py [--quick] [--folder=docs/results]

8 stages of one unit, a draft of half a stage, right with probability 0.79; 1,000 tokens of a trace
(`jaxfm.parallel.simulation.simulator`, which counts the engine's own ticks). Draft-then-verify uses
the length that is best for each point. `pipe_links.svg`: the share of the speed without delay that
is left as a hop takes up to two stages; `pipe_right.svg`: speed-up over plain pipelined decoding by
the probability. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import pathlib

from jaxfm.parallel.pipe.speed import Pipe, linear_cost
from jaxfm.parallel.simulation.heads import Head, RoundHead
from jaxfm.parallel.simulation.simulator import best_speculative, draw_ranks, simulate

COLOURS = {"continuous": "#0b6e4f", "draft-then-verify": "#c8553d", "plain": "#555555"}


def rates(right: float, link: float, tokens: int) -> dict[str, float]:
    """Tokens a unit of time."""
    pipe, ranks = Pipe(8, 1.0, 0.5, link, linear_cost(0.0)), draw_ranks(tokens, (right,), seed=0)
    length, _ = best_speculative(ranks, pipe)
    heads = {
        "continuous": Head(ranks), "draft-then-verify": RoundHead(ranks, length),
        "plain": Head(ranks, width=0),
    }  # fmt: skip
    return {name: float(simulate(head, pipe).rate) for name, head in heads.items()}


def picture(title: str, label: str, xs: list[float], curves: dict[str, list[float]]) -> str:
    """A line plot as a stand-alone SVG."""
    wide, high, left, top = 560, 320, 56, 40
    most = 1.05 * max(max(ys) for ys in curves.values())
    x_of = lambda x: left + (wide - left - 20) * (x - xs[0]) / (xs[-1] - xs[0])
    y_of = lambda y: high - 48 - (high - 48 - top) * y / most
    text = lambda x, y, words, anchor="middle": (
        f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{words}</text>'
    )
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" '
        'font-family="sans-serif" font-size="12" fill="#222">',
        f'<rect width="{wide}" height="{high}" fill="#fff"/>', text(wide / 2, 20, title),
        text(wide / 2, high - 8, label),
    ]  # fmt: skip
    for i in range(5):
        y = most * i / 4
        out.append(f'<line x1="{left}" x2="{wide - 20}" y1="{y_of(y):.1f}" y2="{y_of(y):.1f}" '
                   'stroke="#ddd"/>')  # fmt: skip
        out.append(text(left - 6, y_of(y) + 4, f"{y:.2f}", "end"))
    out += [text(x_of(x), high - 30, f"{x:g}") for x in xs]
    for i, (name, ys) in enumerate(curves.items()):
        points = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in zip(xs, ys, strict=True))
        colour = COLOURS[name]
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out.append(f'<g fill="{colour}">{text(wide - 24, top + 4 + 15 * i, name, "end")}</g>')
    return "\n".join([*out, "</svg>"]) + "\n"


def main(quick: bool, folder: pathlib.Path) -> dict:
    tokens = 200 if quick else 1000
    hops = [0.0, 0.25, 0.5, 1.0, 1.5, 2.0]
    by_hop = [rates(0.79, hop, tokens) for hop in hops]
    left = {name: [r[name] / by_hop[0][name] for r in by_hop] for name in COLOURS}
    shares = [0.1, 0.3, 0.5, 0.66, 0.8, 0.9, 0.95]
    by_right = [rates(share, 0.05, tokens) for share in shares]
    gain = {
        name: [r[name] / r["plain"] for r in by_right]
        for name in ("continuous", "draft-then-verify")
    }
    if not quick:
        folder.mkdir(parents=True, exist_ok=True)
        title = "Share of the speed without delay that is left, 8 stages"
        (folder / "pipe_links.svg").write_text(picture(title, "hop, in stages", hops, left))
        title = "Speed over plain pipelined decoding, 8 stages, hop of 0.05"
        label = "probability that the draft is right"
        (folder / "pipe_right.svg").write_text(picture(title, label, shares, gain))
    rounded = lambda curves: {name: [round(y, 3) for y in ys] for name, ys in curves.items()}
    return {"name": "pipe_links", "hops": hops, "left": rounded(left), "right": shares,
            "speed_up": rounded(gain)}  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short text, no pictures")
    parser.add_argument("--folder", type=pathlib.Path, default="docs/results", help="of pictures")
    given = parser.parse_args()
    print(json.dumps(main(given.quick, given.folder)))
