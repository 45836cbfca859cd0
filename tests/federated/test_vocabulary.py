"""A vocabulary from summed pair counts: that of all texts, and no word of one site."""

import math
import random

import numpy as np
import pytest

from jaxfm.federated.accounting.epsilon import Sampling, epsilon_of
from jaxfm.federated.vocabulary import Noise, client_counts, federated_bpe, plain_total, threshold
from jaxfm.tasks.hpc.generator import generate
from jaxfm.tasks.hpc.naming import restyle
from jaxfm.tasks.hpc.render import to_c
from jaxfm.tokenizer import train_bpe

SECRET = "zqxwvk_secret_kernel"


def sources(seed, number):
    rng = random.Random(seed)
    programs = (restyle(item.program, rng) for item in generate(seed, number))
    return [to_c(program, style=style).text for program, style in programs]


SITES = [sources(1, 12), sources(2, 5), [], sources(3, 9)]


def test_without_noise_it_is_the_bpe_of_all_texts():
    found = federated_bpe(SITES, 310)
    central = train_bpe([text for site in SITES for text in site], 310)
    assert found.tokenizer.vocab == central.vocab
    text = sources(9, 1)[0] + " é\t€"
    assert found.tokenizer.encode(text) == central.encode(text)
    assert found.tokenizer.decode(found.tokenizer.encode(text)) == text
    assert math.isinf(found.epsilon) and found.rounds == 50


def test_masked_sums_give_the_same_merges():
    def masked(counts):
        rng = np.random.default_rng(5)
        draw = lambda: rng.integers(0, 2**32, counts[0].shape, np.uint64)
        masks = [draw() for _ in counts[1:]]
        masks.append(-np.sum(masks, axis=0, dtype=np.uint64))
        sent = [(c.astype(np.uint64) + m) % 2**32 for c, m in zip(counts, masks, strict=True)]
        return (np.sum(sent, axis=0, dtype=np.uint64) % 2**32).astype(np.int64)

    assert federated_bpe(SITES, 272, total=masked).merges == federated_bpe(SITES, 272).merges


def test_the_order_of_sites_and_texts_does_not_matter():
    turned = [site[::-1] for site in SITES[::-1]]
    assert federated_bpe(turned, 280).merges == federated_bpe(SITES, 280).merges


def planted():
    """Many sites, one of which writes its secret all the time."""
    sites = [[text[:400] for text in sources(seed, 6)] for seed in range(12)]
    sites[3] = [text + f"\n{SECRET}" * 200 for text in sites[3]]
    return sites


def pieces_of_the_secret(found):
    learnt = {left + right for left, right in found.merges}
    return [token for token in learnt if len(token) > 2 and token.strip("Ġ") in SECRET]


def test_a_word_of_one_site_stays_out():
    sites = planted()
    assert any("zqxwvk" in token for token in pieces_of_the_secret(federated_bpe(sites, 276)))
    noise = Noise(0.5, clip=16.0, cap=40, protects="text")
    for found in (
        federated_bpe(sites, 284, least_sites=2),
        federated_bpe(sites, 284, least_sites=2, merges_per_round=8, noise=noise, seed=0),
    ):
        assert len(found.merges) >= 8
        assert not [token for token in pieces_of_the_secret(found) if "zq" in token]
        for left, right in found.merges:  # each is a pair that two sites have
            text = (left + right).replace("Ġ", " ").replace("Ċ", "\n").replace("ĉ", "\t")
            assert sum(any(text in source for source in site) for site in sites) >= 2, text


def test_epsilon_is_that_of_all_rounds_that_were_planned():
    noise = Noise(4.0, protects="site")
    found = federated_bpe(SITES, 292, merges_per_round=8, noise=noise)
    assert found.epsilon == epsilon_of(4.0, 4, 1e-5, Sampling(4, 4))
    assert found.rounds <= 4


@pytest.mark.parametrize("protects", ["text", "site"])
def test_nobody_moves_the_sum_by_more_than_the_clip(protects):
    noise = Noise(1.0, clip=7.5, cap=5, protects=protects)
    rng = np.random.default_rng(0)
    draw = lambda: {
        tuple(rng.integers(0, 9, 4).tolist()): int(rng.integers(1, 90)) for _ in range(20)
    }
    for _ in range(20):
        units = [draw()] if protects == "site" else [draw() for _ in range(5)]
        with_it, without = client_counts(units, 9, noise), client_counts(units[:-1], 9, noise)
        assert np.linalg.norm(with_it - without) <= 7.5
        assert with_it.max() <= 5 and with_it.dtype == np.int64


def test_noise_alone_makes_no_merge():
    found = federated_bpe([[], []], 292, merges_per_round=8, noise=Noise(1.0), seed=0)
    assert not found.merges and found.tokenizer.vocab_size == 260
    assert threshold(Noise(1.0), 2, 260, 4) > Noise(1.0).cap


def test_no_texts_leave_the_bytes():
    assert federated_bpe([[], []], 300).tokenizer.vocab_size == 260
    assert plain_total([np.array([1]), np.array([2])]).tolist() == [3]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"sites": []}, "no site"),
        ({"sites": ["text"]}, "list of texts"),
        ({"vocab_size": 259}, "at least 260"),
        ({"least_sites": 9}, "between 1 and"),
        ({"least_sites": 0}, "between 1 and"),
        ({"merges_per_round": 0}, "at least 1"),
        ({"noise": Noise(0.0)}, "positive and finite"),
        ({"noise": Noise(math.nan)}, "positive and finite"),
        ({"noise": Noise(1.0, delta=2)}, "between 0 and 1"),
        ({"noise": Noise(1.0, protects="file")}, "'text' or a 'site'"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        federated_bpe(**({"sites": SITES, "vocab_size": 270} | arguments))
