"""Several machines, played by network namespaces on this one: joined by a pair of virtual cables, one torchrun each.
And the scripts for Slurm and for DeepSpeed's launcher."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.runtime.test_rank_failure import processes_of
from tests.support.launcher import PROJECT, environment, metrics_of

ADDRESSES = ("10.77.0.1", "10.77.0.2")
DEMO = ("--max_steps", "3", "--eval_rows", "16", "--num_threads", "1")
WALL_CLOCK = ("time/", "idle/", "tokens_per_s")
NODE = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


def refusal():
    """Why this process cannot make namespaces; None when it can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    if not (shutil.which("ip") and shutil.which("unshare")):
        return "needs the commands ip (iproute2) and unshare (util-linux)"
    name = f"grpo-try-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode == 0:
        subprocess.run(["ip", "netns", "del", name])
        return None
    return f"ip netns add is refused: {tried.stderr.strip()}"


@pytest.fixture
def hosts():
    """Names of two namespaces, 10.77.0.1 and 10.77.0.2 on `cable` in each. Nothing else can be reached from them."""
    if reason := refusal():
        pytest.skip(reason)
    names = [f"grpo-{os.getpid()}-{letter}" for letter in "ab"]

    def ip(*args, check=True):
        subprocess.run(["ip", *args], check=check, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("-n", names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, ADDRESSES):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name, check=False)


def env_of(**variables):
    return {**environment(), "GRPO_PYTHON": sys.executable, **variables}


def start(*args, inside=(), **variables):
    """One launch/multi_node.sh, on a host when `inside` says so."""
    command = [*inside, "bash", str(PROJECT / "launch" / "multi_node.sh"), *args]
    return subprocess.Popen(
        command, cwd=PROJECT, env=env_of(**variables), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(*jobs, timeout=240.0):
    """[(exit code, stdout, stderr)]. Leaves nobody behind."""
    try:
        return [(*job.communicate(timeout=timeout), job.returncode)[::-1] for job in jobs]
    finally:
        for job in jobs:
            with contextlib.suppress(ProcessLookupError):
                job.kill()  # its workers die with it


def on_both(hosts, *args, wrap=((), ()), **variables):
    """One process on each host."""
    shared = {"NNODES": "2", "MASTER_ADDR": ADDRESSES[0], "GLOO_SOCKET_IFNAME": "cable", **variables}
    jobs = [
        start("1", *args, inside=("ip", "netns", "exec", host, *wrap[rank]), **{**shared, "NODE_RANK": str(rank)})
        for rank, host in enumerate(hosts)
    ]
    return finish(*jobs)


def folders(folder):
    return ("--output_dir", str(folder / "output"), "--runs_dir", str(folder / "runs"))


def measured(folder):
    return [{k: v for k, v in row.items() if not k.startswith(WALL_CLOCK)} for row in metrics_of(folder / "runs")]


def largest_difference(one, other):
    """Over all metrics of all steps; infinite when they are not the same metrics."""
    if [row.keys() for row in one] != [row.keys() for row in other]:
        return float("inf")
    return max(abs(a[key] - b[key]) for a, b in zip(one, other) for key in a)


def weights(folder):
    return load_file(folder / "output" / "checkpoint_3" / "model.safetensors")


@pytest.mark.full
def test_two_hosts_train_as_one_does(hosts, tmp_path):
    """2 nodes x 1 process = 1 node x 2 processes, metrics and weights; with another seed they are not."""
    one, two, control = tmp_path / "one", tmp_path / "two", tmp_path / "control"
    command = ["bash", str(PROJECT / "launch" / "single_node.sh"), "2", *DEMO, *folders(one)]
    single = subprocess.run(command, cwd=PROJECT, env=env_of(), capture_output=True, text=True, timeout=240)
    assert single.returncode == 0, single.stderr[-3000:]
    for folder, extra in ((two, ()), (control, ("--seed", "7"))):
        for code, err, _ in on_both(hosts, *DEMO, *folders(folder), *extra):
            assert code == 0, err[-3000:]

    assert len(measured(one)) == 5, "three steps, and the held-out questions before and after"
    difference = largest_difference(measured(one), measured(two))
    elsewhere = largest_difference(measured(one), measured(control))
    expected, found, other = weights(one), weights(two), weights(control)
    apart = max(np.abs(expected[name] - found[name]).max() for name in expected)
    apart_control = max(np.abs(expected[name] - other[name]).max() for name in expected)
    print(f"metrics differ by {difference:.1e} (control {elsewhere:.1e}), weights {apart:.1e} ({apart_control:.1e})")
    assert difference <= 1e-6 and apart <= 1e-6
    assert elsewhere > 1e-3 and apart_control > 1e-6


@pytest.mark.full
def test_an_output_folder_that_not_all_hosts_see_is_refused(hosts, tmp_path):
    """The second host has another, empty disk where the first one keeps its output."""
    (tmp_path / "output").mkdir()
    other_disk = ("unshare", "-m", "sh", "-c", f'mount -t tmpfs none "{tmp_path}/output" && exec "$@"', "sh")
    began = time.monotonic()
    first, second = on_both(hosts, *DEMO, *folders(tmp_path), wrap=((), other_disk))
    assert time.monotonic() - began < 120, "30 s of looking for the file, and start-up"
    assert first[0] == second[0] == 2, (first, second)
    [message] = [line for line in (first[1] + second[1]).splitlines() if line.startswith("error:")]
    assert "output_dir" in message and "rank 1 does not see" in message
    assert "Traceback" not in first[1] + second[1]
    assert json.loads((tmp_path / "output" / "exit.json").read_text())["code"] == 2


@pytest.mark.full
def test_a_setting_to_mend_ends_both_hosts_with_the_trainers_code(hosts, tmp_path):
    first, second = on_both(hosts, "--lr", "-1", *folders(tmp_path))
    assert first[0] == second[0] == 2, (first, second)
    assert first[1].count("error:") == 1 and "lr: must be" in first[1]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def one_line(result, *words):
    code, err, _ = result
    assert code == 2, result
    assert err.count("\n") == 1 and err.startswith("error: "), err
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"NNODES": ""}, "NNODES: not set"),
        ({"NNODES": "two"}, "NNODES: must be a number"),
        ({"NODE_RANK": ""}, "NODE_RANK: not set"),
        ({"NODE_RANK": "2"}, "NODE_RANK: must be a number from 0 to 1, got 2"),
        ({"NODE_RANK": "-1"}, "NODE_RANK: must be a number from 0 to 1, got -1"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR: not set"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT: must be a number from 1 to 65535"),
        ({"GLOO_SOCKET_IFNAME": "nosuch0"}, "GLOO_SOCKET_IFNAME: no interface nosuch0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_variables_end_in_one_line(wrong, message):
    began = time.monotonic()
    [result] = finish(start("1", **{**NODE, "MASTER_PORT": free_port(), **wrong}), timeout=20)
    one_line(result, message)
    assert time.monotonic() - began < 10


def test_bad_process_count_ends_in_one_line():
    [result] = finish(start("none", **NODE), timeout=20)
    one_line(result, "NPROC: must be a number >= 1, got none")


def test_taken_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        [result] = finish(start("1", **NODE, MASTER_PORT=port), timeout=20)
    one_line(result, f"MASTER_PORT: port {port} cannot be used")


def test_unreachable_master_is_given_up_in_time():
    variables = {**NODE, "NODE_RANK": "1", "MASTER_PORT": free_port(), "REACH_TIMEOUT_S": "2"}
    began = time.monotonic()
    [result] = finish(start("1", **variables), timeout=20)
    one_line(result, "MASTER_ADDR: 127.0.0.1:", "not reached within 2 s")
    assert 2 <= time.monotonic() - began < 8


def test_silent_master_is_given_up_in_time(hosts):
    """An address that nobody has, on a cable that swallows what is sent: no refusal comes back, only silence."""
    inside = ("ip", "netns", "exec", hosts[0])
    subprocess.run([*inside, "ip", "route", "add", "blackhole", "10.78.0.0/24"], check=True)
    addresses, variables = ("10.77.0.9", "10.78.0.1"), {**NODE, "NODE_RANK": "1", "REACH_TIMEOUT_S": "3"}
    began = time.monotonic()
    jobs = [start("1", inside=inside, **{**variables, "MASTER_ADDR": address}) for address in addresses]
    for address, result in zip(addresses, finish(*jobs, timeout=30), strict=True):
        one_line(result, f"MASTER_ADDR: {address}:", "not reached within 3 s")
    assert time.monotonic() - began < 12


def test_node_0_notices_that_the_address_is_not_its_own(hosts):
    inside = ("ip", "netns", "exec", hosts[0])
    variables = {**NODE, "MASTER_ADDR": ADDRESSES[1], "REACH_TIMEOUT_S": "3"}
    [result] = finish(start("1", inside=inside, **variables), timeout=30)
    one_line(result, f"MASTER_ADDR: {ADDRESSES[1]}:29500 does not lead to this machine")


def test_a_node_that_never_comes_is_given_up_in_time():
    """Control: with everybody there the roll call ends well, shown by the tests on two hosts."""
    began = time.monotonic()
    [result] = finish(start("1", **NODE, MASTER_PORT=free_port(), JOIN_TIMEOUT_S="2"), timeout=20)
    one_line(result, "NNODES: 1 of 2 nodes came within 2 s; missing: NODE_RANK 1")
    assert time.monotonic() - began < 8


CONTRADICTIONS = [  # what the third of three nodes has, its processes, what all three say
    ({"NODE_RANK": "1"}, "1", "two nodes say 1"),
    ({"NNODES": "4", "NODE_RANK": "3"}, "1", "node 3 says 4, node 0 says 3"),
    ({"NODE_RANK": "2"}, "2", "node 2 starts 2 processes, node 0 1"),
]


def test_nodes_that_contradict_each_other_all_say_so():
    """The three runs, each with a port of its own, wait at the same time."""
    shared = [{**NODE, "NNODES": "3", "MASTER_PORT": free_port()} for _ in CONTRADICTIONS]
    jobs = [[start("1", **{**variables, "NODE_RANK": rank}) for rank in "01"] for variables in shared]
    time.sleep(2)
    for nodes, variables, (differs, nproc, _) in zip(jobs, shared, CONTRADICTIONS, strict=True):
        nodes.append(start(nproc, **{**variables, **differs}))
    results = iter(finish(*(job for nodes in jobs for job in nodes), timeout=30))
    for _, _, message in CONTRADICTIONS:
        for _ in range(3):
            one_line(next(results), message)


def test_something_else_at_the_port_is_not_taken_for_node_0():
    with socket.create_server(("127.0.0.1", 0)) as server:
        job = start("1", **{**NODE, "NODE_RANK": "1", "MASTER_PORT": str(server.getsockname()[1])})
        visitor, _ = server.accept()
        visitor.recv(100)
        visitor.sendall(b"HTTP/1.1 400 Bad Request\n")
        [result] = finish(job, timeout=20)
        visitor.close()
    one_line(result, "answers, but is not node 0 of this run")


# Slurm, played: srun runs its command as two nodes one after the other; Python writes down what it is called with.
SLURM = {
    "scontrol": 'case $1 in show) printf "node-7\\nnode-8\\n" ;; *) echo "scontrol $*" >>"$CALLS" ;; esac',
    "srun": """
nodes=2
while [[ $1 == --* ]]; do echo "srun $1" >>"$CALLS"; case $1 in --nodes=*) nodes=${1#*=} ;; esac; shift; done
code=0
for ((SLURM_NODEID = 0; SLURM_NODEID < nodes; SLURM_NODEID++)); do export SLURM_NODEID; "$@" || code=$?; done
exit $code""",
    "python": """
if [[ $1 == - ]]; then echo "$NODE_RANK of $NNODES at $MASTER_ADDR:$MASTER_PORT" >>"$CALLS"; exit 0; fi
echo "$*" >>"$CALLS"; exit $TRAINER""",
}


def slurm(tmp_path, trainer, cwd=PROJECT, name="slurm.sbatch", args=("8", "--seed", "7"), **variables):
    """A job script of launch/ as sbatch would start it. Returns the finished process and the calls made."""
    for command, text in SLURM.items():
        (tmp_path / command).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / command).chmod(0o755)
    (tmp_path / "calls").write_text("")
    job = {"SLURM_JOB_ID": "120042", "SLURM_JOB_NODELIST": "node-[7-8]", "SLURM_JOB_NUM_NODES": "2"}
    played = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
    env = env_of(**job, **played, TRAINER=str(trainer)) | {"GRPO_PYTHON": str(tmp_path / "python")} | variables
    script = tmp_path / "slurm_script"  # Slurm runs a copy
    script.write_text((PROJECT / "launch" / name).read_text())
    done = subprocess.run(["bash", str(script), *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=60)
    return done, (tmp_path / "calls").read_text().splitlines()


def test_slurm_starts_every_node_with_its_rank(tmp_path):
    done, calls = slurm(tmp_path, trainer=0)
    assert done.returncode == 0, done.stderr
    starts = [call for call in calls if " of " in call]
    assert starts == ["0 of 2 at node-7:20042", "1 of 2 at node-7:20042"]
    started = [call for call in calls if "torchrun.py" in call]
    assert len(started) == 2 and all(call.endswith("train.py --seed 7") for call in started)
    for rank, call in enumerate(started):
        assert f"--nnodes=2 --node_rank={rank} --nproc_per_node=8 --master_addr=node-7 --master_port=20042" in call
    assert "scontrol requeue 120042" not in calls


@pytest.mark.parametrize("code, again", [(75, True), (2, False), (76, False)])
def test_slurm_job_keeps_the_code_and_asks_for_more_time_only_when_it_saved(tmp_path, code, again):
    done, calls = slurm(tmp_path, trainer=code)
    assert done.returncode == code
    assert ("scontrol requeue 120042" in calls) == again


def test_slurm_script_outside_slurm_or_the_project_says_so(tmp_path):
    done, _ = slurm(tmp_path, 0, SLURM_JOB_ID="")
    one_line((done.returncode, done.stderr, ""), "not under Slurm")
    done, _ = slurm(tmp_path, 0, cwd=tmp_path)
    one_line((done.returncode, done.stderr, ""), "Submit from the project's folder")


def slurm_vllm(tmp_path, trainer, *args, **variables):
    """launch/slurm_vllm.sbatch on two nodes."""
    python = {"GRPO_VLLM_PYTHON": str(tmp_path / "python")}
    return slurm(tmp_path, trainer, name="slurm_vllm.sbatch", args=args, **python, **variables)


def test_slurm_serves_on_the_last_node_and_trains_on_the_others(tmp_path):
    done, calls = slurm_vllm(tmp_path, 0, "M", "--seed", "7", SLURM_GPUS_ON_NODE="8", VLLM_FLAGS="--dtype bfloat16")
    assert done.returncode == 0, done.stderr
    [server] = [call for call in calls if "grpo.rollout.vllm.server" in call]
    assert server.endswith("--model M --host 0.0.0.0 --port 30042 --gpus 8 --dtype bfloat16")
    assert {"srun --nodelist=node-8", "srun --nodelist=node-7"} <= set(calls)
    trained = [call for call in calls if "torchrun.py" in call]
    expected = 'train.py --model M --rollout_engine vllm --rollout_server ["http://node-8:30042"] '
    assert trained and all(
        call.endswith(expected + "--rollout_timeout_s 1800 --stall_timeout_s 2400 --seed 7") for call in trained
    )
    assert "--nnodes=1 --node_rank=0 --nproc_per_node=8 --master_addr=node-7" in trained[0]


@pytest.mark.parametrize(
    "args, variables, problem",
    [((), {}, "the model comes first"), (("M",), {"SERVERS": "2"}, "SERVERS must be 1 to 1 of 2 nodes, got 2")],
)
def test_slurm_with_vllm_says_what_is_wrong(tmp_path, args, variables, problem):
    done, calls = slurm_vllm(tmp_path, 0, *args, **variables)
    one_line((done.returncode, done.stderr, ""), problem)
    assert not any("torchrun" in call for call in calls)


def test_slurm_with_vllm_keeps_the_code(tmp_path):
    done, calls = slurm_vllm(tmp_path, 74, "M")
    assert done.returncode == 74 and "scontrol requeue 120042" in calls


def deepspeed(*args, **variables):
    return subprocess.Popen(
        ["bash", str(PROJECT / "launch" / "deepspeed.sh"), *args],
        cwd=PROJECT,
        env=env_of(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    "args, variables, message",
    [
        (["none"], {}, "NPROC: must be a number >= 1, got none"),
        (["2"], {"HOSTFILE": "/nowhere/hostfile"}, "HOSTFILE: no file /nowhere/hostfile"),
    ],
    ids=["process count", "hostfile"],
)
def test_deepspeed_script_refuses_in_one_line(args, variables, message):
    [result] = finish(deepspeed(*args, **variables), timeout=20)
    one_line(result, message)


@pytest.mark.full
def test_deepspeed_launcher_trains_as_torchrun_does(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    command = ["bash", str(PROJECT / "launch" / "single_node.sh"), "2", "--backend", "deepspeed", *DEMO, *folders(one)]
    subprocess.run(command, cwd=PROJECT, env=env_of(), capture_output=True, check=True, timeout=240)
    [(code, err, _)] = finish(deepspeed("2", *DEMO, *folders(two)))
    assert code == 0, err[-3000:]
    assert largest_difference(measured(one), measured(two)) <= 1e-6
    expected, found = weights(one), weights(two)
    assert all(np.abs(expected[name] - found[name]).max() <= 1e-6 for name in expected)


@pytest.mark.full
def test_deepspeed_script_leaves_nobody_behind_when_it_is_ended(tmp_path):
    job = deepspeed("2", *folders(tmp_path))
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "output" / ".ranks" / "rank_1.json").exists():
            assert job.poll() is None and time.monotonic() < deadline, "waited in vain"
            time.sleep(0.2)
        assert len(processes_of(tmp_path)) >= 4, "the control: the script, DeepSpeed's launcher, two ranks"
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=60) != 0
        assert processes_of(tmp_path) == []
    finally:
        for pid in processes_of(tmp_path):
            os.kill(pid, signal.SIGKILL)
