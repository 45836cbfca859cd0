"""Real clients over Flower: a server, and nodes that keep their data.

    python -m jaxfm.launch.flower local --clients=4 -- --algorithm=scaffold --data=digits ...
    python -m jaxfm.launch.flower serve --clients=4 -- --algorithm=scaffold --data=digits ...
    python -m jaxfm.launch.flower join --numbers=0,1,2,3
    python -m jaxfm.launch.flower keys --clients=4

`local` is everything on one machine; `serve` and `join` are its two halves, for two terminals or
two machines; `keys` makes certificates and keys for both. What follows -- are the flags of
`jaxfm.launch.federate`. The folder that serve makes in --folder, app/, is a Flower app, which
`flwr run` takes as well.
"""
