"""Job files are what sbatch, JobSet and bash read, and processes find each other in them."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import yaml
from absl import flags

from jaxfm.config import define_flags, read_command
from jaxfm.launch.cluster.config import ClusterConfig
from jaxfm.launch.cluster.gpu_flags import XLA_FLAGS
from jaxfm.launch.cluster.render import flags_of, render
from jaxfm.processes import detect

SCHEMA = json.loads(pathlib.Path(__file__).with_name("jobset_schema.json").read_text())
GPUS = "--nodes=2 --gpus=8 --cpus=64 --memory_gb=500"
JOBSET = "--kind=jobset --jobset.image=registry/jaxfm:1 --jobset.claim=runs"
# Options of sbatch (its manual page, Slurm 25) that a job file here may have, and their values.
SBATCH = {
    "job-name": r"[^\s,]+", "nodes": r"\d+(-\d+)?", "ntasks-per-node": r"\d+", "mem": r"\d+[KMGT]?",
    "cpus-per-task": r"\d+", "gpus-per-node": r"([a-z]\w*:)?\d+", "partition": r"[\w,.-]+",
    "account": r"[\w.@-]+", "time": r"(\d+-)?\d{1,2}:\d{2}:\d{2}",
    "signal": r"([RB]+:)?(TERM|\d+)(@\d{1,5})?", "output": r"[\w%./-]+",
    "open-mode": r"append|truncate", "requeue": None,
}  # fmt: skip


def made(line, command="federate --data=digits --local=sgd"):
    values = flags.FlagValues()
    define_flags(ClusterConfig, values)
    words = flags_of(["render", *shlex.split(line), "--", *shlex.split(command)])
    return render(read_command(ClusterConfig, ["cluster", *words], values))


def sbatch_options(script):
    """As sbatch reads a script: #! first, then its lines up to the first command, word for word."""
    lines = script.splitlines()
    assert lines[0].startswith("#!/")
    found, over = {}, False
    for line in lines[1:]:
        over |= bool(line.strip()) and not line.startswith("#")
        if not line.startswith("#SBATCH"):
            continue
        assert not over, f"sbatch does not read {line!r}: it stands below a command"
        (word,) = shlex.split(line.removeprefix("#SBATCH"))
        name, _, value = word.removeprefix("--").partition("=")
        assert word.startswith("--") and name in SBATCH and name not in found, word
        assert re.fullmatch(SBATCH[name], value) if SBATCH[name] else not value, word
        assert not set("$`~*") & set(value), f"the shell does not read {word}"
        found[name] = value
    return found


def run_line(script):
    return next(line for line in script.splitlines() if line.startswith("srun "))


def check_bash(script):
    subprocess.run(["bash", "-n"], input=script, text=True, check=True, capture_output=True)


def test_slurm():
    script = made(
        f"{GPUS} --slurm.partition=gpu --slurm.minutes=1500 --slurm.setup='. env/activate'"
    )
    assert sbatch_options(script) == {
        "job-name": "jaxfm", "nodes": "2", "ntasks-per-node": "8", "cpus-per-task": "8",
        "gpus-per-node": "8", "mem": "500G", "time": "1-01:00:00", "partition": "gpu",
        "signal": "TERM@120", "output": "%x-%j.log", "open-mode": "append", "requeue": "",
    }  # fmt: skip
    check_bash(script)
    assert ". env/activate\n" in script
    assert run_line(script).endswith("python -m jaxfm.launch.federate --data=digits --local=sgd")
    assert all(f"{flag.name}={flag.value}" in script and flag.why in script for flag in XLA_FLAGS)
    assert "NCCL_" not in script and "NCCL_PROTO=" in made("--nodes=1 --gpus=2")
    few = made("--nodes=3 --slurm.processes=node")
    assert {"nodes": "3", "ntasks-per-node": "1"}.items() <= sbatch_options(few).items()
    assert not {"gpus-per-node", "cpus-per-task", "mem", "partition"} & sbatch_options(few).keys()
    assert "XLA_FLAGS" not in few


@pytest.mark.parametrize(("status", "restarts", "queued"), [(75, 0, 1), (75, 10, 0), (1, 0, 0)])
def test_a_stopped_job_is_queued_again(tmp_path, status, restarts, queued):
    for name, does in {"srun": f"exit {status}", "scontrol": 'echo "again $*"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7",
        "SLURM_RESTART_COUNT": str(restarts),
    }  # fmt: skip
    done = subprocess.run(
        ["bash"], input=made(""), text=True, env=variables, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (status, "again requeue 7\n" * queued)


def test_an_argument_with_a_space_stays_one_argument():
    line = run_line(made("", "generate --prompt='a b $HOME' --model=m"))
    assert "--prompt=a b $HOME" in shlex.split(line)
    (pod,) = pods(made(JOBSET, "generate --prompt='a b' --model=m"))
    assert "--prompt=a b" in pod["command"]


def problems(schema, value, where="the manifest"):
    """What a value has that a JSON schema of these few words does not allow."""
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    wanted = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if type(value) not in [kinds[name] for name in wanted]:
        return [f"{where} is no {wanted}: {value!r}"]
    found = []
    if isinstance(value, dict):
        known = schema.get("properties", {})
        other = schema.get("additionalProperties", True)
        found += [f"{where} lacks {x}" for x in schema.get("required", ()) if x not in value]
        found += [f"{where} has no {x}" for x in value if x not in known and other is False]
        for name, item in value.items():
            inner = known.get(name, other if isinstance(other, dict) else None)
            found += [] if inner is None else problems(inner, item, f"{where}.{name}")
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            found.append(f"{where} has {len(value)} items")
        for number, item in enumerate(value):
            found += problems(schema["items"], item, f"{where}[{number}]")
    if isinstance(value, str):
        fits = schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
        if not fits or not re.search(schema.get("pattern", ""), value):
            found.append(f"{where} does not match: {value!r}")
    if type(value) is int and not (
        schema.get("minimum", value) <= value <= schema.get("maximum", value)
    ):
        found.append(f"{where} is out of range: {value}")
    if value not in schema.get("enum", [value]):
        found.append(f"{where} is none of {schema['enum']}: {value!r}")
    return found


def pods(text):
    jobs = yaml.safe_load(text)["spec"]["replicatedJobs"]
    return [job["template"]["spec"]["template"]["spec"]["containers"][0] for job in jobs]


@pytest.mark.parametrize(
    "line", [JOBSET, f"{JOBSET} {GPUS} --jobset.queue=lq --jobset.namespace=ml --restarts=0"]
)
def test_jobset(line):
    manifest = yaml.safe_load(made(line))
    assert problems(SCHEMA, manifest) == []
    assert problems(SCHEMA, manifest | {"spec": {"replicatedJob": []}}) != []  # it does look
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["completions"] == job["parallelism"] == 2
    (pod,) = pods(made(line))
    environ = {entry["name"]: entry["value"] for entry in pod["env"]}
    found = [detect(environ | {"JOB_COMPLETION_INDEX": str(index)}) for index in (0, 1)]
    assert [(job.process_id, job.num_processes) for job in found] == [(0, 2), (1, 2)]
    assert found[0].coordinator == "jaxfm-workers-0-0.jaxfm:1234"  # of the first pod
    assert ("nvidia.com/gpu" in json.dumps(pod)) == ("--gpus" in line)


def test_tpu():
    check_bash(one := made("--kind=tpu --nodes=1 --tpu.type=v6e-16 --tpu.zone=z"))
    check_bash(two := made("--kind=tpu --tpu.type=v5p-8 --tpu.spot --tpu.setup='mount /runs'"))
    assert "--node-id=jaxfm" in one and "--runtime-version=v2-alpha-tpuv6e" in one
    assert (
        "--node-count=2 --node-prefix=jaxfm --spot" in two and "for node in jaxfm-0 jaxfm-1;" in two
    )
    for script in (one, two):
        assert "python -m jaxfm.launch.federate --coordinator=auto --data=digits" in script


@pytest.mark.slow
def test_jaxlib_knows_the_flags():  # one that it does not know ends the process
    text = " ".join(f"{flag.name}={flag.value}" for flag in XLA_FLAGS)
    code = "import jax; jax.numpy.zeros(1)"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"XLA_FLAGS": text}, check=True)


@pytest.mark.parametrize(
    ("line", "command", "says"),
    [
        ("--kind=pbs", "federate", "kind='pbs'"),
        ("--nodes=0", "federate", "nodes=0: give at least 1"),
        ("--name=Big_Job", "federate", "name='Big_Job': give up to 40 small letters"),
        ("--gpus=8 --cpus=4", "federate", "cpus=4 with 8 processes a node"),
        ("--slurm.partition='a b'", "federate", "slurm.partition='a b'"),
        ("--slurm.account='$(x)'", "federate", r"slurm.account='\$\(x\)'"),
        ("--slurm.minutes=0", "federate", "slurm.minutes=0"),
        ("--jobset.image=a", "federate", "--jobset.image requires --kind=jobset"),
        ("--kind=jobset", "federate", "requires --jobset.image and --jobset.claim"),
        (f"{JOBSET} --jobset.port=70000", "federate", "jobset.port=70000"),
        (f"{JOBSET} --jobset.mount=runs", "federate", "jobset.mount='runs'"),
        ("--kind=tpu --tpu.type=v9-8", "federate", "tpu.type='v9-8'"),
        ("--kind=tpu --gpus=8", "federate", "gpus changes nothing"),
        ("", "", "Give the script and its flags after --"),
        ("", "serch", "command='serch'.*federate"),
        ("", "federate --rouns=3", "federate: Unknown flag --rouns. Did you mean --rounds"),
        ("", "federate --rounds=-3", "federate: rounds=-3"),
        ("", "federate --coordinator=a:1", "--coordinator is found by each process itself"),
    ],
)
def test_bad_values_are_refused_in_one_sentence(line, command, says):
    with pytest.raises(ValueError, match=says) as error:
        made(line, command)
    assert str(error.value).endswith((".", "?"))


def test_a_command_is_needed():
    with pytest.raises(ValueError, match="Give the command: render"):
        flags_of(["submit"])
