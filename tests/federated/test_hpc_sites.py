"""Sites of HPC code: dialects, sizes, labels, and a test set of families that a site lacks."""

import pytest

from jaxfm.tasks.hpc.sites import DIALECTS, sites, unseen

WRONG = {"sparse C": "false alarms", "reductions": "inverted"}


@pytest.fixture(scope="module")
def made():
    return sites(3, 200, 3, labels=WRONG)


def test_sites_are_unequal_and_write_their_own_families(made):
    assert [len(examples) for examples in made.train.values()] == [80, 60, 40, 20]
    for name, dialect in DIALECTS.items():
        assert {x.family for x in made.train[name]} == set(dialect.families)
        fortran = ["subroutine" in x.source.lower() for x in made.train[name]]
        assert all(fortran) if dialect.language == "fortran" else not any(fortran)


def test_only_wrong_labellers_are_wrong(made):
    for name, examples in made.train.items():
        right = [x for x in examples if x.label == x.racy]
        if name not in WRONG:
            assert right == examples
    assert all(x.label != x.racy for x in made.train["reductions"])
    sparse = made.train["sparse C"]
    assert all(x.label for x in sparse if x.racy)
    safe = [x for x in sparse if not x.racy]
    assert sum(x.label for x in safe) > 0.8 * len(safe)
    assert all(x.label == x.racy for xs in made.test.values() for x in xs)


def test_unseen_families_are_those_of_other_sites(made):
    for dialect in DIALECTS.values():
        found = {x.family for x in unseen(dialect, made.test)}
        assert found and not found & set(dialect.families)


def test_the_seed_decides(made):
    assert sites(3, 200, 3, labels=WRONG) == made


@pytest.mark.parametrize(
    "arguments", [(0, 0, 1), (0, 9, 0)]
)  # fmt: skip
def test_counts_are_checked(arguments):
    with pytest.raises(ValueError, match="at least one item"):
        sites(*arguments)
    with pytest.raises(ValueError, match="cannot label"):
        sites(0, 9, 1, labels={"nobody": "proof"})
