"""A job of several processes is found in made-up environments, and said wrong in one sentence."""

import socket

import pytest
from absl import flags as absl_flags

from jaxfm.config import define_flags, read_command
from jaxfm.launch.simulate import SimulateConfig
from jaxfm.processes import Job, JoinError, detect, first_host, given, join

SLURM = {
    "SLURM_JOB_ID": "4100", "SLURM_STEP_NODELIST": "gpu[007-008]", "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1", "SLURM_GPUS_ON_NODE": "4",
}  # fmt: skip
TORCH = {"MASTER_ADDR": "a", "MASTER_PORT": "29500", "RANK": "3", "WORLD_SIZE": "4"}
OMPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
PMI = {"PMI_SIZE": "4", "PMI_RANK": "2", "PBS_JOBID": "77.server"}
JAX = {"JAX_COORDINATOR_ADDRESS": "set-w-0-0.set:1", "JAX_NUM_PROCESSES": "8"}
TPU = {"TPU_WORKER_HOSTNAMES": "t0,t1", "TPU_WORKER_ID": "1"}
FOUR = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        (SLURM, ("gpu007:61444", 2, 1, None)),  # one task a node: all its GPUs
        (SLURM | FOUR, ("gpu007:61444", 4, 1, (2, 3))),
        (SLURM | FOUR | {"SLURM_GPUS_PER_TASK": "2"}, ("gpu007:61444", 4, 1, None)),  # bound
        (SLURM | {"JAX_COORDINATOR_PORT": "99"}, ("gpu007:99", 2, 1, None)),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # no srun
        (TORCH, ("a:29500", 4, 3, None)),
        (TORCH | {"TORCHELASTIC_USE_AGENT_STORE": "True"}, ("a:29501", 4, 3, None)),
        (
            TORCH | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "4,5"},
            ("a:29500", 4, 3, (1,)),
        ),
        (
            OMPI | {"OMPI_MCA_orte_hnp_uri": "8192.0;tcp://10.0.0.1,10.1.0.1:34911"},
            ("10.0.0.1:61442", 2, 1, None),
        ),
        (OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, ("127.0.0.1:61440", 2, 1, None)),
        (JAX | {"JOB_COMPLETION_INDEX": "5"}, ("set-w-0-0.set:1", 8, 5, None)),
        ({"JOB_COMPLETION_INDEX": "5"}, None),  # an indexed Job may be a sweep
        (TPU, ("t0:8482", 2, 1, None)),
        (
            TPU
            | {
                "MEGASCALE_NUM_SLICES": "3",
                "MEGASCALE_SLICE_ID": "2",
                "MEGASCALE_COORDINATOR_ADDRESS": "first:8080",
            },
            ("first:8482", 6, 5, None),
        ),
        ({"TPU_WORKER_HOSTNAMES": "t0", "TPU_WORKER_ID": "0"}, None),
    ],
)
def test_environments(environ, expected):
    found = detect(environ)
    assert (None if found is None else tuple(found)[:4]) == expected


def test_hosts_from_a_file(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("x1\nx1\nx2\nx2\n")
    assert detect(PMI | {"PBS_NODEFILE": str(hosts)})[:3] == ("x1:61517", 4, 2)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("a", "a"), ("a,b", "a"), ("a[1-3],b", "a1"), ("a[01,07-09]", "a01"),
        ("r[2-3]n[04,05]-ib,z", "r2n04-ib"),
    ],
)  # fmt: skip
def test_first_host(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT missing"),
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID missing"),
        (TORCH | {"RANK": "4"}, "process_id=4 with num_processes=4"),
        (TORCH | {"RANK": "x"}, "RANK='x'"),
        (SLURM | {"SLURM_JOB_ID": ""}, "SLURM_JOB_ID missing"),
        (SLURM | FOUR | {"SLURM_GPUS_ON_NODE": "3"}, "3 GPUs do not divide over the 2 processes"),
        (PMI, "names no host of the first"),
        (PMI | {"PBS_NODEFILE": "/nowhere"}, "PBS_NODEFILE=/nowhere"),
        (OMPI, "names no host of the first"),
    ],
)
def test_a_half_given_job_is_refused(environ, says):
    with pytest.raises(ValueError, match=r"\.$") as error:
        detect(environ)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("a:1", None, None), "--coordinator without --num_processes and --process_id"),
        ((None, "2", "0"), "--num_processes and --process_id without --coordinator"),
        (("a:1", "2", "2"), "process_id=2"),
        (("a", "2", "0"), "coordinator='a'"),
        (("a:99999", "2", "0"), "coordinator='a:99999'"),
        (("a:1", "two", "0"), "num_processes='two'"),
    ],
)
def test_half_given_flags_are_refused(flags, says):
    with pytest.raises(ValueError, match=r"\.$") as error:
        given(*flags)
    assert says in str(error.value)
    assert given(None, None, None) is None


def test_a_silent_coordinator_ends_in_time():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    with pytest.raises(JoinError, match="did not answer process 1 within 1 s"):
        join(Job(f"localhost:{port}", 2, 1), timeout_s=1)


def test_a_script_of_one_process_says_so():
    values = absl_flags.FlagValues()
    define_flags(SimulateConfig, values)
    with pytest.raises(ValueError, match=r"this one runs in one\.$"):
        read_command(SimulateConfig, ["simulate", "--coordinator=a:1"], values)
