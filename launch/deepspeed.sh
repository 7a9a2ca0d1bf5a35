#!/usr/bin/env bash
# Train with the DeepSpeed backend, started by DeepSpeed's own launcher instead of torchrun.
#
#     bash launch/deepspeed.sh [NPROC] [train.py settings]                  this machine; default: one per GPU, or one
#     HOSTFILE=launch/hostfile bash launch/deepspeed.sh [NPROC] [settings]  several, see launch/hostfile.example
#
# Several machines need pdsh here, ssh without a password, and the project and its Python at the same path on all of
# them. MASTER_PORT: on one machine any free one, else 29500. MASTER_ADDR: else what ssh says of the first machine.
# Exit code: that of the rank that failed first, as DeepSpeed's launcher gives it on one machine; with several it is
# pdsh's. launch/multi_node.sh with --backend deepspeed does the same work without ssh, and checks more.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
[[ -x $python ]] || python=python3
python=${GRPO_PYTHON:-$python}

die() { echo "error: $*" >&2; exit 2; }

nproc=
if [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; then
    nproc=$1
    shift
elif [[ $# != 0 && $1 != -* ]]; then
    die "NPROC: must be a number >= 1, got $1. Usage: bash launch/deepspeed.sh [NPROC] [--key value ...]"
fi

options=(--log_level error)
if [[ -n ${HOSTFILE:-} ]]; then
    [[ -f $HOSTFILE ]] || die "HOSTFILE: no file $HOSTFILE. launch/hostfile.example shows what goes into it."
    command -v pdsh >/dev/null || die "HOSTFILE: several machines need pdsh on this one; it is not installed."
    # Without force_multi a hostfile of one machine would be started here, whatever its name.
    options+=(--hostfile "$HOSTFILE" --force_multi --master_port "${MASTER_PORT:-29500}")
    if [[ -n ${MASTER_ADDR:-} ]]; then options+=(--master_addr "$MASTER_ADDR"); fi
else
    nproc=${nproc:-$("$python" -c "import torch; print(max(1, torch.cuda.device_count()))")}
    port=${MASTER_PORT:-$("$python" -c "import socket; print(socket.create_server(('', 0)).getsockname()[1])")}
    options+=(--hostfile none --master_addr 127.0.0.1 --master_port "$port")
fi
if [[ -n $nproc ]]; then options+=(--num_gpus "$nproc"); fi  # its name for processes, also without a GPU

# On one machine the launcher does not pass a signal on to the processes that it started: all of them get it from here.
set -m
"$python" -m deepspeed.launcher.runner "${options[@]}" "$root/train.py" --backend deepspeed "$@" &
launcher=$!
trap 'kill -TERM -- "-$launcher" 2>/dev/null' INT TERM HUP
code=0
wait "$launcher" || code=$?
while kill -0 -- "-$launcher" 2>/dev/null; do sleep 0.2; done  # a signal ends `wait` before they have ended
exit "$code"
