"""What OpenMP orders and what it does not: programs whose verdict is known by hand."""

import re

import pytest

from jaxfm.tasks.hpc.program import (
    Array,
    Assign,
    Block,
    Clause,
    For,
    If,
    Number,
    Op,
    Pragma,
    Program,
    Ref,
    Scalar,
    Standalone,
    Var,
)
from jaxfm.tasks.hpc.proofs.clauses import minimal, propose, right
from jaxfm.tasks.hpc.proofs.enumeration import judge

N = Number(8)
I, J = Var("i"), Var("j")
NOWAIT = Clause("nowait")
STATIC = Clause("schedule", ("static",))
BARRIER, TASKWAIT = Standalone(Pragma("barrier")), Standalone(Pragma("taskwait"))


def a(subscript):
    return Ref("a", (subscript,))


def b(subscript):
    return Ref("b", (subscript,))


def plus(expr, number):
    return Op("+", (expr, Number(number)))


def program(*body):
    arrays = [Array(name, (Number(24),)) for name in "ab"]
    arrays.append(Array("idx", (Number(24),), "int", "colliding"))
    arrays.append(Array("perm", (Number(24),), "int", "permutation"))
    scalars = [Scalar(name, "double", 0, live=name == "s") for name in ("s", "t")]
    return Program((), tuple(arrays), (*scalars, Scalar("k", "int", 0, live=False)), body)


def loop(*body, pragma="parallel for", var="i", clauses=()):
    return For(var, Number(1), N, body, 1, Pragma(pragma, tuple(clauses)))


def region(*body, clauses=()):
    return Block(Pragma("parallel", tuple(clauses)), body)


def block(name, *body, clauses=()):
    return Block(Pragma(name, tuple(clauses)), body)


def task(*body, **depends):
    clauses = [Clause("depend", (v,), k.rstrip("_")) for k, v in depends.items()]
    return block("task", *body, clauses=clauses)


SET_A, GET_A = Assign(a(I), Number(1.0)), Assign(b(I), a(I))
GET_BEFORE = Assign(b(I), a(Op("-", (I, Number(1)))))
SET_B = Assign(b(Number(0)), Number(1.0))
S1, T_S = Assign(Var("s"), Number(1.0)), Assign(Var("t"), Var("s"))
ADD = Assign(Var("s"), b(I), "+")
PRIVATE_K = Clause("private", ("k",))
MAYBE_T = If(Op(">", (b(I), Number(0.0))), (Assign(Var("t"), b(I)),))
S_AFTER = loop(Assign(b(I), Var("s")), pragma="for")
ONE, TWO = Clause("name", ("one",)), Clause("name", ("two",))


@pytest.mark.parametrize(
    ("verdict", "body"),
    [
        ("confirmed", [loop(SET_A, GET_A)]),
        ("refuted", [loop(SET_A, GET_BEFORE)]),
        ("refuted", [loop(ADD)]),
        ("confirmed", [loop(ADD, clauses=[Clause("reduction", ("s",), "+")])]),
        ("confirmed", [loop(block("atomic", ADD))]),
        ("confirmed", [loop(block("critical", ADD))]),
        ("refuted", [loop(block("critical", ADD), block("critical", ADD, clauses=[ONE]))]),
        (
            "refuted",
            [loop(block("critical", ADD, clauses=[ONE]), block("critical", ADD, clauses=[TWO]))],
        ),
        ("refuted", [loop(block("critical", ADD), block("atomic", ADD))]),
        ("refuted", [loop(block("atomic", ADD), Assign(b(I), Var("s")))]),
        ("refuted", [loop(Assign(a(Ref("idx", (I,))), Number(1.0)))]),
        ("confirmed", [loop(Assign(a(Ref("perm", (I,))), Number(1.0)))]),
        ("refuted", [loop(If(Op(">", (b(I), Number(0.5))), (S1,)))]),
        ("confirmed", [loop(If(Op("==", (I, Number(3))), (S1,)))]),
        # Regions: barriers, nowait, equal static loops, single, master, replicated code.
        ("confirmed", [region(loop(SET_A, pragma="for"), loop(GET_BEFORE, pragma="for"))]),
        (
            "refuted",
            [region(loop(SET_A, pragma="for", clauses=[NOWAIT]), loop(GET_BEFORE, pragma="for"))],
        ),
        (
            "confirmed",
            [
                region(
                    loop(SET_A, pragma="for", clauses=[NOWAIT]),
                    BARRIER,
                    loop(GET_BEFORE, pragma="for"),
                )
            ],
        ),
        (
            "confirmed",
            [
                region(
                    loop(SET_A, pragma="for", clauses=[NOWAIT, STATIC]),
                    loop(GET_A, pragma="for", clauses=[STATIC]),
                )
            ],
        ),
        (
            "refuted",
            [
                region(
                    loop(SET_A, pragma="for", clauses=[NOWAIT, STATIC]),
                    loop(GET_A, pragma="for", clauses=[Clause("schedule", ("static", "2"))]),
                )
            ],
        ),
        ("refuted", [region(S1)]),
        ("confirmed", [region(S1, clauses=[Clause("private", ("s",))])]),
        ("confirmed", [region(block("single", S1), S_AFTER)]),
        (
            "refuted",
            [
                region(
                    block("single", S1, clauses=[NOWAIT]),
                    S_AFTER,
                )
            ],
        ),
        ("refuted", [region(block("master", S1), S_AFTER)]),
        ("confirmed", [region(block("master", S1), block("master", T_S))]),
        ("refuted", [region(block("single", S1, clauses=[NOWAIT]), block("single", T_S))]),
        (
            "refuted",
            [
                region(
                    loop(ADD, pragma="for", clauses=[Clause("reduction", ("s",), "+"), NOWAIT]),
                    block("single", T_S),
                )
            ],
        ),
        ("confirmed", [region(For("j", Number(0), N, (loop(SET_A, pragma="for"),)))]),
        (
            "refuted",
            [region(For("j", Number(0), N, (loop(SET_A, pragma="for", clauses=[NOWAIT]),)))],
        ),
        ("confirmed", [block("parallel sections", block("section", S1), block("section", SET_B))]),
        ("refuted", [block("parallel sections", block("section", S1), block("section", T_S))]),
        # Tasks.
        ("refuted", [region(block("single", task(S1), task(T_S)))]),
        ("confirmed", [region(block("single", task(S1, out="s"), task(T_S, in_="s")))]),
        ("refuted", [region(block("single", task(S1, out="s"), task(T_S, in_="t")))]),
        ("refuted", [region(block("single", task(S1, in_="s"), task(S1, in_="s")))]),
        ("confirmed", [region(block("single", task(S1), TASKWAIT, task(T_S)))]),
        ("refuted", [region(block("single", task(task(S1)), TASKWAIT, T_S))]),
        ("confirmed", [region(block("single", block("taskgroup", task(task(S1))), T_S))]),
        ("refuted", [region(block("single", task(S1), T_S))]),
        ("confirmed", [region(block("single", task(S1)), block("single", T_S))]),
        ("refuted", [region(task(S1))]),
        (
            "confirmed",
            [region(block("single", For("i", Number(1), N, (task(SET_A),)), TASKWAIT, SET_B))],
        ),
        (
            "confirmed",
            [
                region(
                    block(
                        "single",
                        For(
                            "i",
                            Number(1),
                            N,
                            (
                                task(
                                    Assign(a(I), a(Op("-", (I, Number(1))))),
                                    out=a(I),
                                    in_=a(Op("-", (I, Number(1)))),
                                ),
                            ),
                        ),
                    )
                )
            ],
        ),
        # What is outside of the enumeration, or of the arrays.
        ("cannot tell", [loop(SET_A, clauses=[Clause("device", ("1",))])]),
        ("cannot tell", [loop(Assign(a(plus(I, 20)), Number(1.0)))]),
        ("cannot tell", [loop(Assign(a(Var("zz")), Number(1.0)))]),
        ("cannot tell", [loop(SET_A, clauses=[Clause("collapse", ("2",))])]),
        ("cannot tell", [region(region(SET_A))]),
        ("cannot tell", [loop(SET_A, pragma="for")]),
        ("cannot tell", [Standalone(Pragma("barrier"))]),
        ("cannot tell", [For("i", Number(0), Number(10**9), (SET_B,))]),
        ("cannot tell", [For("i", Number(0), Op("/", (N, Number(0))), (SET_B,))]),
        (
            "cannot tell",
            [loop(Assign(a(Var("k")), Number(1.0)), clauses=[Clause("private", ("k",))])],
        ),
    ],
)
def test_verdicts_known_by_hand(verdict, body):
    found = judge(program(*body))
    assert (found.verdict, bool(found.conflict)) == (verdict, verdict == "refuted"), found.reason


def test_a_counter_declared_outside_its_loop_is_shared():
    inner = For("j", Number(0), N, (Assign(Ref("c", (I, J)), Number(1.0)),))
    shared = program(loop(inner))
    shared = shared._replace(
        arrays=(Array("c", (N, N)),), scalars=(Scalar("j", "int", 0, live=False),)
    )
    assert judge(shared).conflict.first.name == "j"
    assert judge(shared._replace(scalars=())).verdict == "confirmed"
    assert minimal(shared._replace(body=(shared.body[0]._replace(pragma=None),))).named(
        "private"
    ) == ("j",)


@pytest.mark.parametrize(
    ("clauses", "body", "after"),
    [
        ("private: t", [Assign(Var("t"), b(I)), Assign(a(I), Var("t"))], []),
        (
            "lastprivate: t",
            [Assign(Var("t"), b(I)), Assign(a(I), Var("t"))],
            [Assign(b(Number(0)), Var("t"))],
        ),
        ("reduction: s", [ADD], []),
        ("reduction: s", [Assign(Var("s"), Op("max", (b(I), Var("s"))))], []),
        ("reduction: a", [Assign(a(Number(0)), b(I), "+")], []),
        ("", [block("atomic", ADD)], []),
        (None, [ADD, Assign(a(I), Var("s"))], []),
        (None, [Assign(a(I), Var("t")), Assign(Var("t"), b(I))], []),
        (None, [ADD, Assign(Var("s"), b(I), "*")], []),
        (
            None,
            [If(Op(">", (b(I), Number(0.0))), (Assign(Var("t"), b(I)),)), Assign(a(I), Var("t"))],
            [],
        ),
        (
            None,
            [If(Op("==", (I, Number(2))), (Assign(Var("t"), b(I)),))],
            [Assign(b(Number(0)), Var("t"))],
        ),
    ],
)
def test_minimal_clauses_known_by_hand(clauses, body, after):
    serial = program(For("i", Number(1), N, tuple(body)), *after)
    pragma = minimal(serial)
    if clauses is None:
        assert pragma is None
        return
    written = [f"{clause.name}: {', '.join(clause.arguments)}" for clause in pragma.clauses]
    assert ", ".join(written) == clauses
    shown = serial._replace(body=(serial.body[0]._replace(pragma=pragma), *after))
    assert right(shown).verdict == "confirmed"


@pytest.mark.parametrize(
    ("clause", "complaint"),
    [
        (Clause("private", ("s",)), "reads s before it has written it"),
        (Clause("firstprivate", ("s",)), "The value of s is read after|keeps what its thread"),
        (Clause("lastprivate", ("s",)), "reads s before"),
        (Clause("reduction", ("s",), "*"), r"s is not only updated with \*"),
    ],
)
def test_clauses_without_a_race_may_still_be_wrong(clause, complaint):
    found = right(program(loop(ADD, clauses=[clause])))
    assert found.verdict == "refuted" and re.search(complaint, found.reason)


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ([block("critical", S1)], "s"),
        ([block("critical", ADD), block("critical", Assign(a(I), Var("s")))], "s"),
        ([block("critical", ADD), block("atomic", ADD)], ""),
        ([block("critical", ADD), block("critical", SET_A)], ""),
        ([block("critical", ADD, Assign(Var("s"), b(I), "*"))], "s"),
    ],
)
def test_the_order_of_critical_sections_may_decide_results(body, name):
    serial = program(For("i", Number(1), N, tuple(body)))
    found = propose(serial)
    assert found.order == name and (name == "" or found.pragma is None)
    judged = right(program(loop(*body)))
    assert (name in judged.reason and judged.verdict == "cannot tell") or not name
