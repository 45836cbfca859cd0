"""A batch script for Slurm, which starts one process for each GPU.

sbatch reads the lines #SBATCH up to the first command. SIGTERM reaches the processes `grace_s`
seconds before the time limit; they save and end with status 75, and the job is queued again.
"""

from __future__ import annotations

import shlex

from jaxfm.launch.cluster.config import ClusterConfig
from jaxfm.launch.cluster.gpu_flags import cpus_of_process, environment
from jaxfm.preemption import EXIT_STATUS


def render(config: ClusterConfig) -> str:
    """The script of a job."""
    tasks = config.processes_per_node
    each = cpus_of_process(config.cpus, tasks)
    options = {
        "job-name": config.name,
        "nodes": config.nodes,
        "ntasks-per-node": tasks,
        "cpus-per-task": each,
        "gpus-per-node": config.gpus,
        "mem": f"{config.memory_gb}G" if config.memory_gb else "",
        "time": _time(config.slurm.minutes),
        "partition": config.slurm.partition,
        "account": config.slurm.account,
        "signal": f"TERM@{config.grace_s}",
        "output": "%x-%j.log",
        "open-mode": "append",
    }
    head = [f"#SBATCH --{name}={value}" for name, value in options.items() if value]
    lines = [
        "#!/bin/bash",
        "# Submit with sbatch, from a folder that all machines see.",
        *head,
        "#SBATCH --requeue",
        "",
        *config.slurm.setup,
    ]
    for setting in environment(config.gpus, config.nodes):
        lines += [f"# {why}" for why in setting.why.splitlines()]
        lines.append(f"export {setting.name}={shlex.quote(setting.value)}")
    if each:
        lines.append(f"export SRUN_CPUS_PER_TASK={each}  # srun does not take sbatch's")
    script, *flags = config.command
    run = shlex.join([config.python, "-m", f"jaxfm.launch.{script}", *flags])
    lines += [
        "",
        "# One that ends does not end the others at once: they save, or say why, and end by",
        "# themselves.",
        f"srun --kill-on-bad-exit=0 --wait={config.grace_s} {run}",
        "status=$?",
        f"# {EXIT_STATUS}: stopped early and saved; the same command goes on.",
        f'if [ "$status" -eq {EXIT_STATUS} ] && '
        f'[ "${{SLURM_RESTART_COUNT:-0}}" -lt {config.restarts} ]; then',
        '    scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        'exit "$status"',
    ]
    return "\n".join(lines) + "\n"


def _time(minutes: int) -> str:
    """Days-hours:minutes:seconds.

    >>> _time(1500)
    '1-01:00:00'
    """
    hours, rest = divmod(minutes, 60)
    return f"{hours // 24}-{hours % 24:02}:{rest:02}:00"
