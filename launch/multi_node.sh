#!/usr/bin/env bash
# Train on several machines: run this on each of them, with its own NODE_RANK (docs/multi_node.md).
#
#     NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash launch/multi_node.sh [NPROC] [train.py settings]
#
# NPROC, processes on this machine, must be the same everywhere; default: one per GPU, or one. MASTER_ADDR is the
# machine with NODE_RANK=0. MASTER_PORT (29500) must be free there. A machine waits REACH_TIMEOUT_S (60) to reach
# it, and it waits JOIN_TIMEOUT_S (300) for all the others. GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, the network
# interfaces to use, are passed on; set the first one on machines with more than one. Python is found as in
# single_node.sh. Exit code: the trainer's (launch/torchrun.py), or 2 when the machines do not find each other.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
[[ -x $python ]] || python=python3
python=${GRPO_PYTHON:-$python}

die() { echo "error: $*" >&2; exit 2; }

number() {  # name, least, largest allowed
    local value=${!1:-}
    [[ -n $value ]] || die "$1: not set. Usage: NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash launch/multi_node.sh"
    if [[ ! $value =~ ^(0|[1-9][0-9]{0,5})$ ]] || ((value < $2 || value > $3)); then
        die "$1: must be a number from $2 to $3, got $value."
    fi
}

export MASTER_PORT=${MASTER_PORT:-29500} REACH_TIMEOUT_S=${REACH_TIMEOUT_S:-60} JOIN_TIMEOUT_S=${JOIN_TIMEOUT_S:-300}
number NNODES 1 99999
number NODE_RANK 0 $((NNODES - 1))
number MASTER_PORT 1 65535
number REACH_TIMEOUT_S 1 99999
number JOIN_TIMEOUT_S 1 99999
[[ -n ${MASTER_ADDR:-} ]] || die "MASTER_ADDR: not set. It is the address or name of the machine with NODE_RANK=0."

if [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; then
    nproc=$1
    shift
elif [[ $# == 0 || $1 == -* ]]; then
    nproc=$("$python" -c "import torch; print(max(1, torch.cuda.device_count()))")
else
    die "NPROC: must be a number >= 1, got $1. Usage: bash launch/multi_node.sh [NPROC] [--key value ...]"
fi
export NNODES NODE_RANK MASTER_ADDR

# A roll call before torchrun: what it would end in a page of traceback, or wait for in silence, is said in one line.
# NODE_RANK 0 listens on the port that torchrun will use and closes it before it tells the others to go, so that no
# torchrun can meet the roll call instead of its store.
"$python" - "$nproc" <<'EOF'
import ctypes
import json
import os
import socket
import sys
import threading
import time


def die(message):
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(2)


nproc = int(sys.argv[1])
nnodes, me, port, reach_s, join_s = (
    int(os.environ[name]) for name in ("NNODES", "NODE_RANK", "MASTER_PORT", "REACH_TIMEOUT_S", "JOIN_TIMEOUT_S")
)
master = os.environ["MASTER_ADDR"]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)  # when the script is ended, do not keep the port

for name in filter(None, os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")):
    have = [interface for _, interface in socket.if_nameindex()]
    if name not in have:
        die(f"GLOO_SOCKET_IFNAME: no interface {name} here. Allowed: {', '.join(have)}.")


def take_port():
    try:  # as torchrun's store does: every address, IPv6 and IPv4 where there are both
        both = socket.has_dualstack_ipv6() and os.path.exists("/proc/net/if_inet6")
        family = socket.AF_INET6 if both else socket.AF_INET
        return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=nnodes)
    except OSError as error:
        die(f"MASTER_PORT: port {port} cannot be used here ({os.strerror(error.errno)}). Another run may hold it: "
            "end that, or set another MASTER_PORT on every node.")


def roll_call(server):
    """Hear every node, then tell all of them the same: go, or what is wrong."""
    deadline, present, wrong = time.monotonic() + join_s, {}, None
    while len(present) < nnodes and not wrong:
        try:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            visitor, (address, *_) = server.accept()
        except TimeoutError:
            missing = [str(rank) for rank in range(nnodes) if rank not in present]
            wrong = (f"NNODES: {len(present)} of {nnodes} nodes came within {join_s} s; missing: NODE_RANK "
                     f"{', '.join(missing[:8])}. Start them, or lower NNODES; JOIN_TIMEOUT_S sets the wait.")
            break
        try:
            visitor.settimeout(5)
            rank, theirs, processes = json.loads(visitor.makefile().readline(200))
        except (OSError, ValueError, TypeError):
            visitor.close()  # not one of us: a port scan, say
            continue
        if rank in present:
            wrong = f"NODE_RANK: two nodes say {rank}; give each its own, 0 to {nnodes - 1}."
        elif theirs != nnodes:
            wrong = f"NNODES: node {rank} says {theirs}, node 0 says {nnodes}. Set the same on every node."
        elif processes != nproc:
            wrong = f"NPROC: node {rank} starts {processes} processes, node 0 {nproc}. Start as many on every node."
        present[(rank, address) if wrong else rank] = visitor
    server.close()
    for visitor in present.values():
        try:
            visitor.sendall(f"roll call: {wrong or 'go'}\n".encode())
        except OSError:
            continue  # torchrun will miss it
        visitor.close()


if me == 0:
    caller = threading.Thread(target=roll_call, args=(take_port(),), daemon=True)
    caller.start()

deadline, line = time.monotonic() + reach_s, None
while line is None:  # node 0 too: that its own address leads back to it is part of the check
    try:
        line = socket.create_connection((master, port), timeout=max(1, min(5, reach_s)))
    except OSError as error:
        if time.monotonic() >= deadline or (me == 0 and not isinstance(error, TimeoutError)):
            why = error.strerror or "no answer"
            if me == 0:
                die(f"MASTER_ADDR: {master}:{port} does not lead to this machine ({why}), which has NODE_RANK 0.")
            die(f"MASTER_ADDR: {master}:{port} not reached within {reach_s} s ({why}). Is node 0 started, the address "
                "right, the port open? REACH_TIMEOUT_S sets the wait.")
        time.sleep(0.5)
try:
    line.sendall(json.dumps([me, nnodes, nproc]).encode() + b"\n")
    line.settimeout(join_s + 10)
    answer = line.makefile(errors="replace").readline(1000).strip()
except OSError:
    answer = ""
if me == 0 and answer:
    caller.join()  # all are told before this one leaves
if not answer.startswith("roll call: "):
    die(f"MASTER_ADDR: {master}:{port} answers, but is not node 0 of this run, or it ended before all nodes were there "
        "(then it says why).")
if answer != "roll call: go":
    die(answer.removeprefix("roll call: "))
EOF

# The timeout is for what may still differ between nodes that are all there: how long Python takes to start.
exec "$python" "$root/launch/torchrun.py" --nnodes="$NNODES" --node_rank="$NODE_RANK" --nproc_per_node="$nproc" \
    --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" --rdzv_conf=timeout=300 "$root/train.py" "$@"
