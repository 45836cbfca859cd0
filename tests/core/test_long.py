"""The list of tests that `make test` leaves to `make test-long`."""

import pathlib

TESTS = pathlib.Path(__file__).resolve().parents[1]


def test_every_name_in_the_list_is_a_test():
    for line in (TESTS / "long.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        file, _, name = line.partition("::")
        assert f"def {name.partition('[')[0]}(" in (TESTS / file).read_text(), line
