"""How fast labelled programs are generated, and how much of their labels words give away.

    python benchmarks/hpc_generator.py [--quick] [--items=6000] [--seed=0]

Times `generate` in processor seconds, one process. Then a logistic regression on the words of the
rendered loops (their 1- to 3-grams, too) is trained on five sixths and scored on the rest, for all
families together and for the loops alone; half would be guessing. The last line is one JSON object.
"""

import argparse
import json
import random
import re
import time

from jaxfm.tasks.hpc.families import LOOPS
from jaxfm.tasks.hpc.generator import generate
from jaxfm.tasks.hpc.render import loop_source, random_style


def accuracy(items, words: int, seed: int) -> float:
    """How many labels of the last sixth a logistic regression on n-grams of words gets right."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    rng = random.Random(seed)
    texts = [loop_source(item.program, style=random_style(rng)).text for item in items]
    labels = [item.racy for item in items]
    split = len(items) * 5 // 6
    tokens = lambda text: re.findall(r"[A-Za-z_]+|\d|[^\w\s]", text)
    counts = CountVectorizer(tokenizer=tokens, token_pattern=None, ngram_range=(1, words))
    features = counts.fit_transform(texts)
    model = LogisticRegression(max_iter=2000, C=0.3).fit(features[:split], labels[:split])
    return round(float(model.score(features[split:], labels[split:])), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="1,020 items")
    parser.add_argument("--items", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    count = 1020 if args.quick else args.items
    began = time.process_time()
    items = generate(args.seed, count)
    seconds = time.process_time() - began
    loops = generate(args.seed, count, LOOPS)
    share = sum(item.racy for item in items) / count
    print(f"{count} items in {seconds:.1f} processor seconds, {share:.0%} of them racy")
    result = {
        "name": "hpc_generator",
        "items": count,
        "seed": args.seed,
        "generator_items_per_s": round(count / seconds),
        "racy_share": round(share, 3),
        "words_accuracy": accuracy(items, 1, args.seed),
        "words_accuracy_loops": accuracy(loops, 1, args.seed),
        "three_words_accuracy_loops": accuracy(loops, 3, args.seed),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
