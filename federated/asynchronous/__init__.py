"""Rounds without a barrier: clients come back when they are done, and the server does not wait.

    when = availability.diurnal(num_clients, hours=8, seed=0)
    plan = buffered(seconds, concurrency=100, buffer_size=10, num_steps=500, when=when, seed=0)
    rounds = compile_asynchronous(fed_avg(...), population, plan, staleness=polynomial(0.5))
    state, info = rounds.run(rounds.init(variables, key))

or, in a whole run, `train(..., clock=Clock(buffer_size=10))`.

Who arrives when does not depend on what is learned, so that a simulated clock settles it before
(`schedule`); the rounds themselves are one compiled program (`steps`).
"""

from jaxfm.federated.asynchronous.availability import Availability, always, diurnal
from jaxfm.federated.asynchronous.availability import read as read_availability
from jaxfm.federated.asynchronous.clock import Clock
from jaxfm.federated.asynchronous.schedule import Schedule, buffered, synchronous
from jaxfm.federated.asynchronous.staleness import constant, hinge, polynomial
from jaxfm.federated.asynchronous.steps import AsyncState, compile_asynchronous

__all__ = [
    "AsyncState",
    "Availability",
    "Clock",
    "Schedule",
    "always",
    "buffered",
    "compile_asynchronous",
    "constant",
    "diurnal",
    "hinge",
    "polynomial",
    "read_availability",
    "synchronous",
]
