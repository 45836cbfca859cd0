"""Reading a function's jaxpr: its graph, its channel groups, their costs, masked and sliced runs."""
