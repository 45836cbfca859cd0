"""A JobSet for Kubernetes: one pod on each machine, with all its GPUs.

Pods find the first one by its stable name. One that is evicted, or ends with status 75, has saved:
the set starts again without counting it; other failures count.
Sources: jobset.sigs.k8s.io (v1alpha2), kubernetes.io "Pod failure policy".
"""

from __future__ import annotations

from typing import Any

import yaml

from jaxfm.launch.cluster.config import ClusterConfig
from jaxfm.launch.cluster.gpu_flags import environment
from jaxfm.preemption import EXIT_STATUS

_POD, _WORKERS = "main", "workers"


def render(config: ClusterConfig) -> str:
    """The manifest of a job."""
    options = config.jobset
    metadata: dict[str, Any] = {"name": config.name}
    if options.namespace:
        metadata["namespace"] = options.namespace
    if options.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": options.queue}
    job = {
        "parallelism": config.nodes,
        "completions": config.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [
            {"action": "FailJob",
             "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            {"action": "FailJob",
             "onExitCodes": {"containerName": _POD, "operator": "In", "values": [EXIT_STATUS]}},
        ]},
        "template": {"spec": _pod(config)},
    }  # fmt: skip
    manifest = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {
                "maxRestarts": config.restarts,
                "rules": [{
                    "name": "stopped",
                    "action": "RestartJobSetAndIgnoreMaxRestarts",
                    "onJobFailureReasons": ["PodFailurePolicy"],
                }],
            },
            "replicatedJobs": [{"name": _WORKERS, "replicas": 1, "template": {"spec": job}}],
        },
    }  # fmt: skip
    head = "# Submit with kubectl apply -f; JobSet 0.6 or newer.\n"
    return head + yaml.safe_dump(manifest, sort_keys=False, width=100)


def _pod(config: ClusterConfig) -> dict[str, Any]:
    options = config.jobset
    script, *flags = config.command
    meet = f"{config.name}-{_WORKERS}-0-0.{config.name}:{options.port}"
    variables = {
        "JAX_COORDINATOR_ADDRESS": meet,  # the pod's index is its number: JOB_COMPLETION_INDEX
        "JAX_NUM_PROCESSES": str(config.nodes),
    } | {setting.name: setting.value for setting in environment(config.gpus, config.nodes)}
    requests: dict[str, Any] = {"cpu": str(config.cpus), "memory": f"{config.memory_gb}Gi"}
    requests = {name: amount for name, amount in requests.items() if amount not in ("0", "0Gi")}
    resources: dict[str, Any] = {"requests": requests} if requests else {}
    if config.gpus:
        resources["limits"] = {"nvidia.com/gpu": config.gpus}
    mounts = [{"name": "runs", "mountPath": options.mount}]
    volumes: list[dict[str, Any]] = [
        {"name": "runs", "persistentVolumeClaim": {"claimName": options.claim}}
    ]
    if config.gpus > 1:  # where NCCL lets the GPUs of a machine talk
        mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})
        volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory"}})
    container = {
        "name": _POD,
        "image": options.image,
        "workingDir": options.mount,
        "command": [config.python, "-m", f"jaxfm.launch.{script}", *flags],
        "env": [{"name": name, "value": value} for name, value in variables.items()],
        "ports": [{"containerPort": options.port}],
        "resources": resources,
        "volumeMounts": mounts,
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": config.grace_s,
        "containers": [container],
        "volumes": volumes,
    }
