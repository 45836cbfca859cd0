"""Search: how to shrink a model to a budget.

`project` turns any proposal into channel counts that meet every budget; a `Strategy` proposes;
`loop.run` asks, projects, evaluates and tells in one compiled program; `supernet` orders a model's
channels by importance, trains its members together and hands out the ones that fit.
"""
