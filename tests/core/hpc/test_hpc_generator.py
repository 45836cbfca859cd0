"""Generated programs: labels against an enumeration of the test's own, balance, seeds, names."""

import collections
import itertools
import random
import shutil
import subprocess

import pytest

from jaxfm.tasks.hpc import naming
from jaxfm.tasks.hpc.families import FAMILIES, LOOPS
from jaxfm.tasks.hpc.generator import asked, generate
from jaxfm.tasks.hpc.program import Assign, Block, For, If, Number, Op, Ref, Var, walk
from jaxfm.tasks.hpc.proofs.clauses import minimal, right
from jaxfm.tasks.hpc.proofs.contents import contents
from jaxfm.tasks.hpc.proofs.enumeration import judge
from jaxfm.tasks.hpc.render import loop_source, random_style, to_c, to_fortran

ITEMS = generate(5, 17 * 14)


class Plain:
    """A second interpreter, for programs of serial loops and one `parallel for`.

    It writes down every access as (iteration, name, element, is a write, protection), and compares
    all pairs of accesses; it shares no code with the proof.
    """

    def __init__(self, program):
        self.env = {size.name: size.value for size in program.sizes}
        self.sizes = dict(self.env)
        self.scalars = {scalar.name for scalar in program.scalars}
        self.ints = {}
        self.types = {x.name: x.dtype for x in (*program.arrays, *program.scalars)}
        for array in program.arrays:
            if array.dtype == "int":
                self.ints[array.name] = dict(enumerate(contents(array, self.sizes).ravel()))
        for scalar in program.scalars:
            self.env[scalar.name] = scalar.value if scalar.dtype == "int" else None
        self.log, self.iteration, self.private, self.guard = [], None, set(), ""
        self.run(program.body)

    def note(self, name, element, write):
        if self.iteration is not None and name not in self.private:
            self.log.append((self.iteration, name, element, write, self.guard))

    def eval(self, e):
        match e:
            case Number(value):
                return value if isinstance(value, int) else None
            case Var(name):
                if name in self.scalars:
                    self.note(name, (), False)
                return self.env[name]
            case Ref(name, subscripts):
                element = tuple(self.eval(s) for s in subscripts)
                self.note(name, element, False)
                return int(self.ints[name][element[0]]) if name in self.ints else None
            case Op(op, args):
                values = [self.eval(a) for a in args]
                if any(v is None for v in values):
                    return None
                a, b = values if len(values) == 2 else (0, values[0])
                table = {"+": a + b, "-": a - b, "*": a * b, "<": a < b, "<=": a <= b, ">": a > b}
                table |= {"==": a == b, "!=": a != b, ">=": a >= b}
                if b:
                    table |= {"/": int(a / b), "%": a - b * int(a / b)}
                return table.get(op)

    def run(self, body):
        for s in body:
            match s:
                case Assign(target, value, update):
                    new = self.eval(value)
                    if isinstance(target, Var):
                        name, element = target.name, ()
                    else:
                        name = target.array
                        element = tuple(self.eval(e) for e in target.subscripts)
                    self.note(name, element, True)
                    if isinstance(target, Var) and self.types[name] == "int":
                        old = self.env[name]
                        known = new is not None and (not update or old is not None)
                        self.env[name] = (old + new if update else new) if known else None
                    elif name in self.ints:
                        self.ints[name][element[0]] = new
                case If(condition, then, orelse):
                    taken = self.eval(condition)
                    if taken is None or taken:
                        self.run(then)
                    if taken is None or not taken:
                        self.run(orelse)
                case For():
                    self.loop(s)
                case Block(pragma, inner):
                    old = self.guard
                    self.guard = pragma.directive + "".join(pragma.named("name"))
                    self.run(inner)
                    self.guard = old

    def loop(self, s):
        if s.pragma:
            outer = self.private
            for clause in s.pragma.clauses:
                if clause.name in ("private", "lastprivate", "reduction"):
                    self.private = self.private | set(clause.arguments)
            levels = int((s.pragma.named("collapse") or ("1",))[0])
            self.number, self.region = 0, getattr(self, "region", 0) + 1
            self.share(s, levels)
            self.iteration, self.private = None, outer
            return
        for i in range(self.eval(s.lower), self.eval(s.upper), s.step):
            if s.var in self.scalars:
                self.note(s.var, (), True)
            self.env[s.var] = i
            self.run(s.body)

    def share(self, s, levels):
        for i in range(self.eval(s.lower), self.eval(s.upper), s.step):
            self.env[s.var] = i
            if levels > 1:
                self.share(s.body[0], levels - 1)
            else:
                self.iteration = (self.region, self.number)
                self.number += 1
                self.run(s.body)
                self.iteration = None

    def races(self):
        found = set()
        for a, b in itertools.combinations(self.log, 2):
            same_place = a[1:3] == b[1:3] and (a[3] or b[3])
            if a[0][0] == b[0][0] and a[0] != b[0] and same_place and not (a[4] and a[4] == b[4]):
                found.add(a[1])
        return found


class Region(Plain):
    """A region's threads by the dice: who runs an iteration, a section or a `single` is drawn.

    Accesses of one phase, the time between two barriers, by two threads are unordered.
    """

    def __init__(self, program, rng):
        self.rng, self.threads, self.phase = rng, rng.choice((2, 3, 5)), 0
        super().__init__(program)

    def by(self, thread, body):
        self.iteration = (self.phase, thread)
        self.run(body)
        self.iteration = None

    def run(self, body):
        for s in body:
            directive = s.pragma.directive if getattr(s, "pragma", None) else ""
            waits = directive and not any(c.name == "nowait" for c in s.pragma.clauses)
            if directive == "parallel":
                self.run(s.body)
            elif directive in ("sections", "parallel sections"):
                for k, section in enumerate(s.body):  # as many threads as sections
                    self.by(k, section.body)
            elif directive == "for":
                self.shared(s)
            elif directive in ("single", "master"):
                self.by(0 if directive == "master" else self.rng.randrange(self.threads), s.body)
                waits = waits and directive == "single"
            elif directive != "barrier":
                super().run((s,))
                continue
            self.phase += bool(waits)

    def shared(self, s):
        points = range(self.eval(s.lower), self.eval(s.upper), s.step)
        chunks = s.pragma.named("schedule")
        for number, i in enumerate(points):
            thread = self.rng.randrange(self.threads)
            if chunks[:1] == ("static",):
                size = int(chunks[1]) if chunks[1:] else -(-len(points) // self.threads)
                thread = number // size % self.threads
            self.env[s.var] = i
            self.by(thread, s.body)


class Tasks(Plain):
    """Tasks as the nodes of a graph: two that no path joins are unordered."""

    def __init__(self, program):
        self.before, self.children, self.outs, self.ins = {}, [], {}, {}
        super().__init__(program)

    def node(self, *earlier):
        number = len(self.before)
        self.before[number] = {*earlier}.union(*(self.before[k] for k in earlier))
        return number

    def run(self, body):
        for s in body:
            directive = s.pragma.directive if getattr(s, "pragma", None) else ""
            if directive == "parallel":
                self.iteration = self.node()
                self.run(s.body)
                self.iteration = None
            elif directive == "single":
                self.run(s.body)
            elif directive == "task":
                self.task(s)
            elif directive in ("taskwait", "taskgroup"):
                first = 0 if directive == "taskwait" else len(self.children)
                if directive == "taskgroup":
                    self.run(s.body)
                self.iteration = self.node(self.iteration, *self.children[first:])
            else:
                super().run((s,))

    def task(self, s):
        creator, self.iteration = self.iteration, None
        earlier, places = {creator}, []
        for clause in s.pragma.clauses:
            for a in clause.arguments:
                place = (a.array, self.eval(a.subscripts[0])) if isinstance(a, Ref) else (a, 0)
                places.append((place, clause.modifier != "in"))
                earlier |= self.outs.get(place, set())
                earlier |= self.ins.get(place, set()) if clause.modifier != "in" else set()
        self.iteration = task = self.node(*earlier)
        self.run(s.body)
        for place, writes in places:
            if writes:
                self.outs[place], self.ins[place] = {task}, set()
        for place, writes in places:
            if not writes:
                self.ins.setdefault(place, set()).add(task)
        self.children.append(task)
        self.iteration = self.node(creator)

    def races(self):
        return {
            a[1]
            for a, b in itertools.combinations(self.log, 2)
            if a[1:3] == b[1:3] and (a[3] or b[3]) and not (a[4] and a[4] == b[4])
            and a[0] != b[0] and not {a[0], b[0]} & (self.before[a[0]] | self.before[b[0]])
        }  # fmt: skip


@pytest.mark.parametrize("family", ["region", "sections", "tasks"])
def test_labels_of_teams_agree_with_drawn_schedules_and_with_graphs(family):
    rng, counts = random.Random(7), collections.Counter()
    for item in generate(61, 40, [family]):
        if family == "tasks":
            racing = bool(Tasks(item.program).races())
        else:
            draws = 12 if family == "region" else 1
            racing = any(Region(item.program, rng).races() for _ in range(draws))
        assert item.racy == racing, loop_source(item.program).text
        counts[item.racy] += 1
    assert min(counts.values()) > 8


def one_loop(item):
    return item.family in LOOPS


def test_labels_agree_with_an_enumeration_of_all_pairs():
    counts = collections.Counter()
    for item in filter(one_loop, ITEMS):
        racing = Plain(item.program).races()
        assert item.racy == bool(racing), loop_source(item.program).text
        if item.racy:
            assert item.conflict.second.name in racing
        counts[item.racy] += 1
    assert min(counts.values()) > 50


def test_a_racy_program_has_a_concrete_pair_of_two_iterations():
    for item in ITEMS:
        assert (
            item.racy == (item.conflict is not None) == (judge(item.program).verdict == "refuted")
        )
        if item.conflict:
            first, second, iterations = item.conflict
            assert first.name == second.name and (first.write or second.write)
            paths = dict(walk(item.program.body))
            assert first.path in paths and second.path in paths
            if one_loop(item):
                assert iterations[0] != iterations[1]


def test_labels_are_balanced_in_each_family():
    for family in FAMILIES:
        racy = [item.racy for item in ITEMS if item.family == family]
        assert 3 <= sum(racy) <= 11, family


def test_mutants_are_of_both_labels():
    kinds = collections.Counter((i.mutation.split()[-1], i.racy) for i in ITEMS if i.mutation)
    assert kinds["dropped", True] > 5 and kinds["shifted", False] > 3


def test_the_pragma_asked_for_is_right_and_the_program_without_has_no_other():
    asking = [item for item in ITEMS if item.target is not None]
    for item in asking:
        serial = asked(item)
        assert minimal(serial, item.target) == item.pragma, loop_source(serial).text
        if item.pragma is not None:
            from jaxfm.tasks.hpc.proofs.clauses import with_pragma

            shown = with_pragma(serial, item.target, item.pragma)
            assert right(shown).verdict == "confirmed", loop_source(shown).text
            for number in range(len(item.pragma.clauses)):  # none of its clauses can go
                clauses = item.pragma.clauses[:number] + item.pragma.clauses[number + 1 :]
                less = item.pragma._replace(clauses=clauses)
                assert right(with_pragma(serial, item.target, less)).verdict == "refuted"
    assert sum(item.pragma is None for item in asking) > 20


def test_seeds_decide_everything_and_counts_nothing():
    assert generate(3, 30) == generate(3, 40)[:30] != generate(4, 30)


def test_unseen_coefficients_are_other_ones():
    def numbers(items):
        return {
            abs(e.args[1].value)
            for item in items
            for _, s in walk(item.program.body)
            if isinstance(s, Assign) and isinstance(s.target, Ref)
            for e in s.target.subscripts
            if isinstance(e, Op) and isinstance(e.args[1], Number) and item.mutation == ""
        }

    usual = numbers(generate(2, 60, ["line", "scan"]))
    unseen = numbers(generate(2, 60, ["line", "scan"], coefficients="unseen"))
    assert usual and max(usual) <= 16 and unseen - usual


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"families": ["lines"]}, "There is no family 'lines'; choose of line"),
        ({"families": []}, "No family was given"),
        ({"coefficients": "odd"}, "Coefficients are usual, unseen, not 'odd'"),
        ({"count": -1}, "A count is at least 0, not -1"),
    ],
)
def test_wrong_arguments_are_named(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        generate(0, **{"count": 2, **arguments})


def test_names_and_layout_change_nothing_but_the_text():
    rng = random.Random(0)
    for item in ITEMS[:60]:
        other, style = naming.restyle(item.program, rng)
        assert naming.normalized(other) == naming.normalized(item.program)
        assert (judge(other).verdict == "refuted") == item.racy
        assert loop_source(other, style=style).text != loop_source(item.program).text
    with pytest.raises(ValueError, match="Two names become 'z'"):
        naming.renamed(ITEMS[0].program, dict.fromkeys(naming.named(ITEMS[0].program), "z"))


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
def test_c_compiles(tmp_path):
    rng = random.Random(1)
    functions = [to_c(x.program, f"k{k}", random_style(rng)).text for k, x in enumerate(ITEMS)]
    (tmp_path / "all.c").write_text("\n".join(["#include <math.h>", *functions]))
    command = ["gcc", "-std=c11", "-Wall", "-Werror", "-fopenmp", "-fsyntax-only", "all.c"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:2000]


@pytest.mark.skipif(shutil.which("gfortran") is None, reason="gfortran is not installed")
def test_fortran_compiles(tmp_path):
    rng = random.Random(2)
    items = [item for item in ITEMS if "fortran" in item.languages]
    text = [to_fortran(x.program, f"k{k}", random_style(rng)).text for k, x in enumerate(items)]
    (tmp_path / "all.f90").write_text("\n".join(text))
    command = ["gfortran", "-fopenmp", "-fsyntax-only", "all.f90"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:2000]


def test_lines_point_at_their_statements():
    for item in ITEMS[:100]:
        for language in item.languages:
            text, lines = loop_source(item.program, language)
            rows = text.splitlines()
            for path, statement in walk(item.program.body):
                row = rows[lines[path] - 1]
                if isinstance(statement, For):
                    assert statement.var in row and ("for" in row or "do" in row)
                elif isinstance(statement, Assign):
                    target = statement.target
                    name = target.name if isinstance(target, Var) else target.array
                    assert row.strip().startswith(name)


def test_races_that_only_another_schedule_shows_are_marked():
    items = generate(6, 60, ["region"])
    masked = [item for item in items if item.masked]
    assert masked and all(item.racy for item in masked) and len(masked) < len(items) // 2
