"""What a team of threads does with the directives of a program; see `enumeration`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from jaxfm.tasks.hpc.program import (
    Assign,
    Block,
    For,
    If,
    Path,
    Pragma,
    Program,
    Standalone,
    Statement,
    walk,
)
from jaxfm.tasks.hpc.proofs.machine import Machine, Unknown
from jaxfm.tasks.hpc.proofs.scope import Scope, Thread
from jaxfm.tasks.hpc.proofs.steps import Loops, Step, Steps, count
from jaxfm.tasks.hpc.proofs.tasks import atomic, locked, task, taskgroup, taskwait

SHARED = {"for", "sections", "single", "master", "masked", "barrier"}
KNOWN = {"schedule", "collapse", "nowait", "default", "num_threads", "shared", "name", "depend"}
KNOWN |= {"private", "firstprivate", "lastprivate", "reduction", "update", "read", "write"}


class Team:
    """Runs directives: regions, shared loops, sections, tasks, synchronization."""

    def __init__(self, program: Program, by_default_static: bool = False) -> None:
        self.steps = Steps(program, self.directive)
        self.default = ("static",) if by_default_static else ()
        self.parallel = False  # while closures of a region's body are made
        # Of the region being run: segments that a barrier has ended, and static loops' segments.
        self.epoch = 0
        self.static: dict[tuple, int] = {}

    def directive(self, statement: Statement, path: Path, loops: Loops) -> Step:
        """The closure of a statement with a directive."""
        pragma: Pragma = statement.pragma  # type: ignore[union-attr, assignment]
        words = pragma.directive.split()
        if words[-1] == "simd" and len(words) > 1:
            words = words[:-1]
        for clause in pragma.clauses:
            if clause.name not in KNOWN:
                raise Unknown(f"The enumeration does not know the clause {clause.name}.")
        match (words, statement):
            case (["parallel", "for"], For()):
                return self.region(pragma, [self.shared_loop(statement, path, loops, True)], path)
            case (["parallel", "sections"], Block()):
                return self.region(pragma, [self.sections(statement, path, loops, True)], path)
            case (["parallel"], Block(_, body)):
                if self.parallel:
                    raise Unknown("A parallel region stands inside another.")
                self.parallel = True
                parts = self.team(body, path, loops)
                self.parallel = False
                return self.region(pragma, parts, path)
            case (["critical"], Block(_, body)):
                name = "".join(pragma.named("name"))
                return locked(self.steps, frozenset({f"critical {name}"}), body, path, loops)
            case (["atomic"], Block(_, (Assign() as assign,))):
                return atomic(self.steps, assign, pragma, path, loops)
            case (["task"], Block()):
                return task(self.steps, statement, path, loops)
            case (["taskwait"], Standalone()):
                return taskwait
            case (["taskgroup"], Block(_, body)):
                return taskgroup(self.steps.block(body, path, loops))
        raise Unknown(f"The enumeration does not know `{pragma.directive}` here.")

    # Regions -------------------------------------------------------------------------------------

    def region(self, pragma: Pragma, parts: list[Callable], path: Path) -> Step:
        """A parallel region: its parts are run by a team; all end before what follows."""
        scope = Scope(self.steps, pragma, path)
        simple = len(pragma.directive.split()) > 1

        def run(m: Machine) -> None:
            self.epoch, self.static = m.upto(), {}
            if simple:  # its only construct has the clauses itself
                for part in parts:
                    part(m, [])
            else:
                saved = scope.enter(m)
                threads = [Thread(m.start(self.epoch), scope.values(m)) for _ in range(2)]
                for thread in threads:
                    m.segment = thread.segment
                    scope.first_reads(m)
                for part in parts:
                    part(m, threads)
                scope.combine(m, self.epoch)
                scope.leave(m, saved)
            m.forget()

        return run

    def team(self, body: tuple[Statement, ...], path: Path, loops: Loops, first: int = 0) -> list:
        """What a team does with the statements of a region, one function each."""
        return [self.member(s, (*path, k), loops) for k, s in enumerate(body, first)]

    def member(self, statement: Statement, path: Path, loops: Loops) -> Callable:
        """A statement of a region: a construct of the team, or code that each thread runs."""
        pragma = getattr(statement, "pragma", None)
        words = pragma.directive.split() if pragma else []
        words = words[:1] if words[1:] == ["simd"] else words
        match (words, statement):
            case (["for"], For()):
                return self.shared_loop(statement, path, loops, False)
            case (["sections"], Block()):
                return self.sections(statement, path, loops, False)
            case (["single"], Block()):
                return self.single(statement, path, loops)
            case (["master"] | ["masked"], Block(_, body)):
                return each(self.steps.block(body, path, loops), first_only=True)
            case (["barrier"], Standalone()):
                return lambda m, threads: self.barrier(m, threads)
            case (["parallel", *_], _):
                raise Unknown("A parallel region stands inside another.")
            case ([], For(body=body)) if shares(body):
                return self.team_loop(statement, path, loops)
            case ([], If(_, then, orelse)) if shares((*then, *orelse)):
                return self.team_branch(statement, path, loops)
        return each(self.steps.statement(statement, path, loops))

    def team_loop(self, loop: For, path: Path, loops: Loops) -> Callable:
        """A serial loop around constructs of the team: all threads take its iterations together."""
        if loop.var in self.steps.types:
            raise Unknown(f"Threads share the loop variable {loop.var} of a loop with constructs.")
        bounds = self.steps.bounds(loop, path, loops)
        parts = self.team(loop.body, path, (*loops, loop.var))

        def run(m: Machine, threads: list[Thread]) -> None:
            threads[0].resume(m)
            iterations = bounds(m)
            threads[0].pause(m)
            count(m, len(iterations))
            for i in iterations:
                m.values[loop.var] = i
                for part in parts:
                    part(m, threads)

        return run

    def team_branch(self, branch: If, path: Path, loops: Loops) -> Callable:
        """A condition around constructs of the team, alike for all threads."""
        condition = self.steps.value(branch.condition, path, loops)
        then = self.team(branch.then, path, loops)
        orelse = self.team(branch.orelse, path, loops, len(branch.then))

        def run(m: Machine, threads: list[Thread]) -> None:
            chosen = None
            for thread in threads:
                thread.resume(m)
                chosen = condition(m)
                thread.pause(m)
            if chosen is None:
                raise Unknown("A condition around a construct of the team is not known.")
            for part in then if chosen else orelse:
                part(m, threads)

        return run

    def barrier(self, m: Machine, threads: list[Thread]) -> None:
        """Everything so far has ended before anything that follows."""
        m.forget()
        self.epoch, self.static = m.upto(), {}
        for thread in threads:
            thread.segment = m.start(self.epoch)
            thread.children, thread.depends = [], {}

    # Worksharing ---------------------------------------------------------------------------------

    def shared_loop(self, loop: For, path: Path, loops: Loops, own_region: bool) -> Callable:
        """A loop whose iterations are shared out; a barrier ends it unless `nowait` is given."""
        steps, pragma = self.steps, loop.pragma
        assert pragma is not None
        nest = collapsed(loop, pragma)
        names: list[str] = []
        bounds: list[Callable[[Machine], range]] = []
        at = path
        for depth, level in enumerate(nest):
            bounds.append(steps.bounds(level, at, (*loops, *names)))
            names.append(level.var)
            at = (*at, 0) if depth + 1 < len(nest) else at
        body = steps.block(nest[-1].body, at, (*loops, *names))
        scope = Scope(self.steps, pragma, path, tuple(n for n in names if n in steps.types))
        schedule = next((c for c in pragma.clauses if c.name == "schedule"), None)
        chunks = schedule.arguments if schedule else self.default
        static = chunks if chunks[:1] == ("static",) else None

        def work(m: Machine, start: int) -> None:
            space = list(points(m, names, bounds))
            count(m, len(space))
            for number, point in enumerate(space):
                segment = m.start(start)
                if static:  # the same thread as the same iteration of an equal loop
                    key = (static, len(space), number)
                    m.before[segment] |= self.static.get(key, 0)
                    self.static[key] = m.upto()
                m.values.update(point)
                scope.piece(m, body, number + 1 == len(space), names)

        return self.shared(scope, pragma, work, own_region)

    def sections(self, block: Block, path: Path, loops: Loops, own_region: bool) -> Callable:
        """Sections, each run once by an arbitrary thread."""
        scope = Scope(self.steps, block.pragma, path)
        parts = [
            self.steps.block(section.body, (*path, k), loops)
            for k, section in enumerate(block.body)
            if isinstance(section, Block) and section.pragma.directive == "section"
        ]
        if len(parts) != len(block.body):
            raise Unknown("A statement of `sections` stands in no section.")

        def work(m: Machine, start: int) -> None:
            for number, part in enumerate(parts):
                m.start(start)
                scope.piece(m, part, number + 1 == len(parts))

        return self.shared(scope, block.pragma, work, own_region)

    def shared(
        self, scope: Scope, pragma: Pragma, work: Callable[[Machine, int], None], own_region: bool
    ) -> Callable:
        """A construct whose pieces are shared out, all of them after what ended at `start`."""
        nowait = any(clause.name == "nowait" for clause in pragma.clauses)

        def run(m: Machine, threads: list[Thread]) -> None:
            if threads:
                threads[0].resume(m)
            saved, start = scope.enter(m), self.epoch
            work(m, start)
            scope.combine(m, start)
            scope.leave(m, saved)
            if threads:
                threads[0].pause(m)
            if not nowait and not own_region:
                self.barrier(m, threads)

        return run

    def single(self, block: Block, path: Path, loops: Loops) -> Callable:
        """Statements that one arbitrary thread runs."""
        scope = Scope(self.steps, block.pragma, path)
        body = self.steps.block(block.body, path, loops)
        nowait = any(clause.name == "nowait" for clause in block.pragma.clauses)

        def run(m: Machine, threads: list[Thread]) -> None:
            threads[0].resume(m)
            saved = scope.enter(m)
            m.start(self.epoch)
            m.children, m.depends, m.defined = [], {}, set()
            scope.fresh(m)
            scope.first_reads(m)
            body(m)
            scope.leave(m, saved)
            if not nowait:
                self.barrier(m, threads)

        return run


def each(step: Step, first_only: bool = False) -> Callable:
    """Code that every thread of a team runs, or its first one alone."""

    def run(m: Machine, threads: list[Thread]) -> None:
        for thread in threads[:1] if first_only else threads:
            thread.resume(m)
            step(m)
            thread.pause(m)

    return run


def shares(body: tuple[Statement, ...]) -> bool:
    """Whether statements hold a construct that a whole team takes part in."""
    pragmas = (getattr(statement, "pragma", None) for _, statement in walk(body))
    return any(pragma and pragma.directive.split()[0] in SHARED for pragma in pragmas)


def collapsed(loop: For, pragma: Pragma) -> list[For]:
    """The loops whose iterations a directive shares out: one, or `collapse` many."""
    depth = int((pragma.named("collapse") or ("1",))[0])
    nest = [loop]
    while len(nest) < depth:
        if len(nest[-1].body) != 1 or not isinstance(nest[-1].body[0], For):
            raise Unknown(f"There are no {depth} loops to collapse.")
        nest.append(nest[-1].body[0])
    return nest


def points(m: Machine, names: list[str], bounds: list[Callable]) -> Iterator[dict[str, int]]:
    """The iterations of a nest, in order."""
    for i in bounds[0](m):
        m.values[names[0]] = i
        if len(names) == 1:
            yield {names[0]: i}
        else:
            yield from ({names[0]: i, **rest} for rest in points(m, names[1:], bounds[1:]))
