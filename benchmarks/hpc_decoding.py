"""Decoders for HPC code: directives (T2), code as text (T7), whole functions (T8), tokens/s.

    python benchmarks/hpc_decoding.py [--quick] [--cache=FOLDER] [--parts=t2,t7,t8,speed]
                                      [--decoder=FOLDER]

T2: a decoder is trained on "loop, then its directive" for some minutes, with the loss on the
directive, and answers held-out loops under the grammar of each: greedily (verified@1), and by the
first of five answers that the proofs pass (verified@5). An answer counts by what the exact
enumeration says of the program that has it, not by its text. Not trivial are the loops whose answer
has clauses or is a refusal. The first of --readings is that of the decoder that is used further:
"noted" is the lexer's tokens with what the dependence graph says of each variable behind the loop,
"lexer" the loop alone, "byte" its bytes.
T7: bits per byte of decoders with each tokenizer, trained on equally many functions, of an n-gram
model and of xz, on held-out functions, and with --files on C or Fortran files of your own. T8: the
T2 decoder puts directives into whole serial functions, which are built, run and watched in the
sandbox. Speed: tokens a second of directives by lookup and by plain decoding, one loop at a time;
both must write the same tokens. The last line is one JSON object.
"""

import argparse
import json
import pathlib
import platform
import time

import jax
import numpy as np

from jaxfm.launch.hpc import evaluate, pragmas
from jaxfm.launch.hpc.completions import (
    Completer,
    Pair,
    bits_per_byte,
    encode,
    in_order,
    prompt_ids,
    scores,
    train,
)
from jaxfm.launch.hpc.writing import figures, translate, write
from jaxfm.models.families.decoder import DecoderConfig
from jaxfm.parallel import generate, lookup, plain
from jaxfm.tasks.hpc import directives, records
from jaxfm.tasks.hpc.directives import prompt
from jaxfm.tasks.hpc.records import Example
from jaxfm.tasks.hpc.records.pragma import not_trivial, question
from jaxfm.tasks.hpc.stored import stored_splits
from jaxfm.tasks.hpc.tokenizers import make_tokenizer
from jaxfm.tasks.hpc.verifiers.translation import translations_verified

READINGS = {  # rows are trained in groups of these most tokens; longer ones are left out
    "noted": (88, 112, 160), "lexer": (72, 96, 128), "byte": (120, 152, 208),
}  # fmt: skip
SHAPES = {"quick": (32, 1), "full": (96, 3)}  # width and layers


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="little data, few steps")
    parser.add_argument("--parts", default="t2,t7,t8,speed")
    parser.add_argument("--cache", default="", help="folder in which drawn programs are kept")
    parser.add_argument("--readings", default="", help=f"of T2, among {', '.join(READINGS)}")
    parser.add_argument("--decoder", default="", help="of launch.hpc train --task=pragma; else one "
                        "is trained for the first reading")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=20.0, help="of each training of T2")
    parser.add_argument("--steps_language", type=int, default=2000, help="of each training of T7")
    parser.add_argument("--processes", type=int, default=1, help="how many draw programs")
    parser.add_argument("--files", nargs="*", default=[], help="sources on which T7 is scored, too")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.readings = args.readings or ("noted" if args.quick else "noted,lexer,byte")
    if args.decoder:
        args.readings = ""
    elif unknown := set(args.readings.split(",")) - set(READINGS):
        parser.error(f"--readings: there is no {unknown.pop()!r}; choose of {', '.join(READINGS)}")
    args.items, args.tests, args.steps = (120, 14, 20) if args.quick else (36000, 200, 2000)
    return args


def fitted(args, groups, tokenizer, minutes: float, steps: int, batch_size: int = 32) -> Completer:
    """A decoder trained until its steps or its minutes end."""
    width, layers = SHAPES["quick" if args.quick else "full"]
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size, embed_dim=width, num_layers=layers, num_heads=4,
        mlp_dim=5 * width // 2, max_len=1024,
    )  # fmt: skip
    began = time.monotonic()
    progress = None
    for done in train(
        config, groups, tokenizer, steps=steps, learning_rate=3e-3, batch_size=batch_size
    ):
        progress = done
        if time.monotonic() - began > 60 * minutes:
            break
    assert progress is not None
    size = sum(leaf.size for leaf in jax.tree.leaves(progress.completer.variables.params))
    print(f"{progress.steps} steps in {time.monotonic() - began:.0f} s, {size:,} parameters, "
          f"loss {progress.loss:.3f}", flush=True)  # fmt: skip
    return progress.completer


def t2(args, results: dict) -> Completer:
    """Trains with each reading; scores the first on all splits, beside the baselines."""
    names = evaluate.TESTS[: 1 if args.quick else None]
    rows, tests = evaluate.questions_for(
        args.seed, args.items, args.tests, names, args.cache, args.processes
    )
    first = pragmas.load(args.decoder) if args.decoder else None
    for name in filter(None, args.readings.split(",")):
        noted, widths = name == "noted", READINGS[name][-1 if args.quick else 0 :]
        tokenizer = make_tokenizer("byte" if name == "byte" else "lexer")
        pair = lambda row, noted=noted: in_order(prompt(row.source, noted), row.label)
        groups = encode([pair(row) for row in rows], tokenizer, widths)
        print(f"T2 {name}: rows by length", [len(group["tokens"]) for group in groups])
        completer = fitted(args, groups, tokenizer, args.minutes, args.steps)
        completer = completer._replace(noted=noted)
        held = [pair(row) for row in tests["in distribution"]]
        held_rows = encode(held, tokenizer, (*widths, 512))
        print(f"T2 {name}: {scores(completer, held_rows)}")
        written = write(completer, [question(row) for row in tests["in distribution"]])
        results[f"t2_verified_at_1_{name}"] = figures(written)["verified_at_1_not_trivial"]
        first = first or completer
    assert first is not None
    for split, kinds in evaluate.decoder_scores(first, rows, tests).items():
        shown = kinds.pop("model")
        count = kinds.pop("rows")
        shown |= {name: own["verified_at_1_not_trivial"] for name, own in kinds.items()}
        share = np.mean([not_trivial(str(row.label)) for row in tests[split]])
        print(f"T2 {split}: {count} loops, {share:.2f} not trivial;", rounded(shown), flush=True)
        results["t2"] = results.get("t2", {}) | {split: rounded(shown)}
    inside = results["t2"]["in distribution"]
    results["t2_verified_at_1"] = inside["verified_at_1_not_trivial"]
    results["t2_verified_at_5"] = inside["verified_at_5_not_trivial"]
    return first


def t7(args, results: dict) -> None:
    """Bits per byte of decoders and of models without any network."""
    task = records.record("language")
    items = args.items if args.quick else args.items // 3
    kept = stored_splits(
        "language", args.seed, items, args.tests, ("train", "in distribution", "unseen family"),
        folder=args.cache, processes=args.processes,
    )  # fmt: skip
    tests = {name: kept[name] for name in ("in distribution", "unseen family")}
    if args.files:
        texts = [pathlib.Path(file).read_text(errors="replace") for file in args.files]
        whole = "\n".join(texts)
        pieces = [whole[at : at + 400] for at in range(0, len(whole), 400)]
        tests["files"] = [Example(p, len(p.encode()), (), "", None) for p in pieces]
    found: dict = {name: {} for name in tests}
    for name, baseline in task.baselines.items():
        for split, own in tests.items():
            bits = task.metric([row.label for row in own], baseline(kept["train"], own))
            found[split][name] = bits["bits_per_byte"]
    texts = [row.source for row in kept["train"]]
    for name in ("lexer",) if args.quick else ("byte", "bpe", "lexer"):
        tokenizer = make_tokenizer(name, texts[:5000], 1024)
        lengths = (256, 384, 512) if name == "byte" else (128, 192, 288)
        lengths = lengths[-1:] if args.quick else lengths
        groups = encode([Pair("", text) for text in texts], tokenizer, lengths)
        steps = args.steps if args.quick else args.steps_language
        completer = fitted(args, groups, tokenizer, float("inf"), steps, batch_size=8)
        for split, own in tests.items():
            held = encode([Pair("", row.source) for row in own], tokenizer, (1023,))
            found[split][f"decoder, {name}"] = bits_per_byte(completer, held)
    for split, shown in found.items():
        print(f"T7 {split}:", rounded(shown), flush=True)
    results["t7_bits_per_byte"] = {split: rounded(shown) for split, shown in found.items()}


def t8(args, results: dict, completer: Completer) -> None:
    """Whole functions with the decoder's directives, beside the baselines."""
    task = records.record("translation")
    rows = records.drawn(task, args.seed, "in distribution", 0, 14 if args.quick else 100)
    rows = rows[: 4 if args.quick else 50]
    programs = [row.item.program for row in rows if row.item]
    answers = {name: baseline([], rows) for name, baseline in task.baselines.items()}
    answers["decoder"] = translate(completer, programs)
    answers["decoder, checked"] = translate(completer, programs, checked=True)
    shown: dict = {}
    for name, texts in answers.items():
        said = translations_verified(list(zip(programs, texts)))
        built = [v.judgements.get("compiler") for v in said]
        shown[name] = {
            "built_at_1": np.mean([j is not None and j.verdict == "confirmed" for j in built]),
            "right_at_1": np.mean([v.verdict == "confirmed" for v in said]),
            "not_told": np.mean([v.verdict == "cannot tell" for v in said]),
        }
        print(f"T8 {name}: {len(rows)} functions;", rounded(shown[name]), flush=True)
    results["t8"] = {name: rounded(values) for name, values in shown.items()}


def speed(args, results: dict, completer: Completer) -> None:
    """Tokens a second of directives, one loop at a time."""
    rows = records.drawn(records.record("pragma"), args.seed + 1, "in distribution", 0, 40)
    asked = [question(row) for row in rows if not_trivial(str(row.label))]
    read = lambda q: q._replace(source=prompt(q.source, completer.noted))
    asked = [directives.in_order(read(q)) for q in asked if q.answer != "none"]
    asked = asked[: 3 if args.quick else 12]
    made = {"plain": plain, "lookup": lookup}
    decoders = {name: make(completer.model, completer.variables) for name, make in made.items()}
    seconds, tokens, passes = {}, {}, {}
    for name, decoder in decoders.items():
        run = lambda q, decoder=decoder: generate(
            decoder, [prompt_ids(q.source, completer.tokenizer)], ticks=64, max_new_tokens=64,
            grammar=directives.grammar_of(q), tokenizer=completer.tokenizer,
            stop_tokens=completer.tokenizer.eos_id,
        )  # fmt: skip
        for q in asked:
            run(q)
        seconds[name], results_ = 0.0, []
        for q in asked:
            took = []
            for _ in range(2 if args.quick else 5):
                began = time.perf_counter()
                result = run(q)
                took.append(time.perf_counter() - began)
            results_.append(result)
            seconds[name] += min(took)
        tokens[name] = [r.tokens[0].tolist() for r in results_]
        passes[name] = sum(int(r.stats.passes[0]) for r in results_)
    if tokens["plain"] != tokens["lookup"]:
        raise SystemExit("The tokens of lookup are not those of plain decoding.")
    count = sum(map(len, tokens["plain"]))
    print(f"speed: {count} tokens;", {n: f"{count / s:.0f} a second" for n, s in seconds.items()})
    results["verified_decoding_speedup"] = round(seconds["plain"] / seconds["lookup"], 3)
    results["tokens_a_pass"] = {name: round(count / n, 2) for name, n in passes.items()}


def rounded(shown: dict) -> dict:
    return {name: round(float(value), 3) for name, value in shown.items()}


def main() -> None:
    args = parse()
    parts = args.parts.split(",")
    results: dict = {"name": "hpc_decoding", "seed": args.seed, "machine": platform.machine()}
    completer = None
    if {"t2", "t8", "speed"} & set(parts):
        completer = t2(args, results)
    if "t7" in parts:
        t7(args, results)
    if "t8" in parts:
        t8(args, results, completer)
    if "speed" in parts:
        speed(args, results, completer)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
