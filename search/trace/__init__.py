"""What a function's jaxpr says: its graph, channel groups, costs, masked and sliced runs."""
