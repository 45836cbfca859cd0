"""How far do verifiers agree with labels, and what does each cost?

    python benchmarks/hpc_verifiers.py [--quick] [--items=340] [--seed=0] [--languages=c,fortran]

Generated programs of all families, their labels proved by enumeration. Of each verifier that judges
races: how many it tells, agreement, false alarms, misses, seconds an item. Beside them gcc's
ThreadSanitizer alone, which is no honest labeller, and gcc's auto-parallelizer as a baseline for
"some directive makes the loop right". Races that compilers' own schedules hide are counted apart.
The last line is one JSON object.
"""

import argparse
import collections
import json
import time

from jaxfm.tasks.hpc.generator import generate
from jaxfm.tasks.hpc.program import Pragma
from jaxfm.tasks.hpc.proofs.clauses import with_pragma
from jaxfm.tasks.hpc.verifiers import auto_parallelizer, thread_sanitizer
from jaxfm.tasks.hpc.verifiers.harness import Kernel
from jaxfm.tasks.hpc.verifiers.verifier import VERIFIERS


def judged(name, verify, programs, truths, families):
    """Prints and returns the confusion of a verifier; `truths` say what a refutation claims."""
    began = time.perf_counter()
    found = verify(programs)
    seconds = (time.perf_counter() - began) / max(len(programs), 1)
    table = collections.Counter((truth, j.verdict) for truth, j in zip(truths, found))
    told = [(truth, j.verdict == "refuted") for truth, j in zip(truths, found)
            if j.verdict != "cannot tell"]  # fmt: skip
    agreement = sum(truth == said for truth, said in told) / len(told) if told else None
    row = {
        "tool": found[0].tool if found else name,
        "items": len(found),
        "told": len(told),
        "agreement": agreement and round(agreement, 4),
        "false_alarms": table[False, "refuted"],
        "missed": table[True, "confirmed"],
        "seconds_an_item": round(seconds, 4),
        "wrong_families": sorted(
            {family for family, truth, j in zip(families, truths, found)
             if j.verdict == ("confirmed" if truth else "refuted")}
        ),
    }  # fmt: skip
    print(f"{name:28} {row}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="17 items, C alone, no Archer")
    parser.add_argument("--items", type=int, default=340)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--languages", default="c,fortran")
    args = parser.parse_args()
    count = 17 if args.quick else args.items
    drawn = generate(args.seed, count)
    items = [item for item in drawn if not item.masked]
    programs, racy = [item.program for item in items], [item.racy for item in items]
    families = [item.family for item in items]
    rows, skipped = {}, {}
    for name, tool in VERIFIERS.items():
        if tool.claim != "race-free" or (args.quick and name == "Archer"):
            continue
        if reason := tool.available():
            skipped[name] = reason
            continue
        rows[name] = judged(name, tool.verify, programs, racy, families)
    if "fortran" in args.languages and not args.quick and "ThreadSanitizer" in rows:
        spoken = [item for item in items if "fortran" in item.languages]
        rows["ThreadSanitizer, Fortran"] = judged(
            "ThreadSanitizer, Fortran", VERIFIERS["ThreadSanitizer"].verify,
            [Kernel(item.program, language="fortran") for item in spoken],
            [item.racy for item in spoken], [item.family for item in spoken],
        )  # fmt: skip
    if "same output" not in skipped:
        verify = VERIFIERS["same output"].verify
        rows["same output"] = judged("same output", verify, programs, racy, families)
    if thread_sanitizer.available() is None:
        part = slice(0, 8 if args.quick else None)
        rows["ThreadSanitizer alone"] = judged(
            "ThreadSanitizer alone",
            thread_sanitizer.plain,
            programs[part],
            racy[part],
            families[part],
        )
    asking = [item for item in drawn if item.target is not None]
    bare = [with_pragma(x.program, x.target, Pragma("parallel for")) for x in asking]
    if auto_parallelizer.available() is None:
        found = auto_parallelizer.verify(bare)
        said = [j.verdict == "confirmed" for j in found]
        right = [item.pragma is not None for item in asking]
        hits = sum(a and b for a, b in zip(said, right))
        rows["auto-parallelizer"] = {
            "tool": auto_parallelizer.name(), "items": len(asking),
            "accuracy": round(sum(a == b for a, b in zip(said, right)) / len(asking), 4),
            "precision": round(hits / max(sum(said), 1), 4),
            "recall": round(hits / max(sum(right), 1), 4),
        }  # fmt: skip
        print(f"{'auto-parallelizer':28} {rows['auto-parallelizer']}")
    executed = [name for name in rows if name in VERIFIERS and VERIFIERS[name].executes]
    share = max((rows[name]["told"] for name in executed), default=0) / max(len(items), 1)
    result = {
        "name": "hpc_verifiers",
        "items": len(items),
        "seed": args.seed,
        "masked": sum(item.masked for item in drawn),
        "racy_share": round(sum(racy) / max(len(racy), 1), 3),
        "executed_share": round(share, 3),
        "skipped": skipped,
        "verifiers": rows,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
