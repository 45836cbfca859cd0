import gzip
import json

import pytest

from jaxfm.tasks.hpc import records, stored
from jaxfm.tasks.hpc.generator import generate
from jaxfm.tasks.hpc.lexer import compact, lex
from jaxfm.tasks.hpc.proofs.enumeration import at_any_size, trace
from jaxfm.tasks.hpc.proofs.integer_sets import for_all_sizes

NAMES = ("train", "unseen family")


def test_stored_splits_are_those_drawn_and_are_read_the_second_time(tmp_path, monkeypatch):
    made = records.splits(records.record("race-detection"), 4, 30, 12, NAMES)
    monkeypatch.setattr(stored, "_PART", 11)
    first = stored.stored_splits("race-detection", 4, 30, 12, NAMES, folder=tmp_path)
    assert first == {name: [r._replace(item=None) for r in rows] for name, rows in made.items()}
    monkeypatch.setattr(stored, "drawn", None)
    assert stored.stored_splits("race-detection", 4, 30, 12, NAMES, folder=tmp_path) == first
    (file,) = tmp_path.iterdir()
    with gzip.open(file, "rt") as stream:
        assert set(json.load(stream)) == set(NAMES)


def test_other_settings_or_another_generator_are_another_file(tmp_path, monkeypatch):
    for seed, version in ((1, "a"), (2, "a"), (2, "b")):
        monkeypatch.setattr(stored, "generator_version", lambda version=version: version)
        stored.stored_splits("race-detection", seed, 3, 2, ("train",), folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_no_process_is_an_error():
    with pytest.raises(ValueError, match="at least one process, not 0"):
        stored.stored_splits("race-detection", 0, 1, 1, processes=0)


def test_a_part_of_the_items_is_what_all_of_them_have_there():
    assert generate(5, 4, start=3) == generate(5, 7)[3:]


def test_labels_for_any_size_agree_with_integer_sets_and_differ_from_small_sizes():
    pytest.importorskip("islpy")
    items = [x for x in generate(3, 120, ("line", "nest"), coefficients="unseen") if not x.racy]
    changed = 0
    for item in items:
        found = at_any_size(item.program)
        changed += found.conflict is not None
        said = for_all_sizes(item.program).verdict
        if said != "cannot tell":
            assert (said == "refuted") == (found.conflict is not None)
        assert trace(item.program).conflict is None
    assert changed


def test_a_compact_text_has_the_same_pieces_and_is_its_own_compact_form():
    for text in (r.source for r in records.drawn(records.record("pragma"), 1, "train", 0, 20)):
        short = compact(text)
        spoken = lambda t: [p.text for p in lex(t) if p.kind != "space"]
        assert spoken(short) == spoken(text) and compact(short) == short
        assert short.count("\n") == text.rstrip().count("\n")
