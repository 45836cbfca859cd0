"""A shell script that asks for TPUs as a queued resource, waits, and runs on all their machines.

Processes find each other by the machines' metadata (`--coordinator=auto`). The same script run
again goes on with the machines that are there.
Source: cloud.google.com/tpu/docs/queued-resources.
"""

from __future__ import annotations

import shlex

from jaxfm.launch.cluster.config import ClusterConfig


def render(config: ClusterConfig) -> str:
    """The script of a job."""
    options = config.tpu
    where = [
        f"--{name}={value}" for name in ("project", "zone") if (value := getattr(options, name))
    ]
    several = config.nodes > 1
    nodes = [f"{config.name}-{n}" for n in range(config.nodes)] if several else [config.name]
    ask = [
        f"--accelerator-type={options.type}",
        f"--runtime-version={options.image}",
        *(
            [f"--node-count={config.nodes}", f"--node-prefix={config.name}"]
            if several
            else [f"--node-id={config.name}"]
        ),
        *(["--spot"] if options.spot else []),
    ]
    script, *flags = config.command
    run = [config.python, "-m", f"jaxfm.launch.{script}", "--coordinator=auto", *flags]
    on_each = " && ".join([*options.setup, shlex.join(run)])
    resource = " ".join(["gcloud compute tpus queued-resources", "{}", config.name, *where])
    lines = [
        "#!/bin/bash",
        "# Run with bash where gcloud is signed in. All machines have to see the runs' folder.",
        "# Afterwards: " + resource.format("delete") + " --force",
        "set -uo pipefail",
        "state() {",
        f"    {resource.format('describe')} --format='value(state.state)' 2> /dev/null",
        "}",
        'if [ -z "$(state)" ]; then',
        f"    {resource.format('create')} \\",
        "        " + " ".join(ask) + " || exit",
        "fi",
        'while now=$(state); [ "$now" != ACTIVE ]; do',
        '    case "$now" in FAILED|SUSPENDING|SUSPENDED)',
        '        echo "The request is $now: delete it, and run this again." >&2; exit 75 ;;',
        "    esac",
        "    sleep 30",
        "done",
        "pids=()",
        f"for node in {' '.join(nodes)}; do",
        f'    {shlex.join(["gcloud", "compute", "tpus", "tpu-vm", "ssh"])} "$node" '
        + " ".join([*where, "--worker=all", f"--command={shlex.quote(on_each)}"])
        + " &",
        '    pids+=("$!")',
        "done",
        "status=0",
        'for pid in "${pids[@]}"; do wait "$pid" || status=$?; done',
        'exit "$status"',
    ]
    return "\n".join(lines) + "\n"
