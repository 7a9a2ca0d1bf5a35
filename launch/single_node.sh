#!/usr/bin/env bash
# Train on this machine.
#
#     bash launch/single_node.sh [NPROC] [train.py settings]        default: one process per GPU, or one
#
# Uses .venv when it is there (bash launch/setup.sh), else python3; GRPO_PYTHON names another one. Paths in the
# settings are seen from where you are. Exit code: the trainer's (launch/torchrun.py). A run that stalls or whose
# process is killed is started again, if it has saved since: GRPO_RESTARTS times at most (default 3).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
[[ -x $python ]] || python=python3
python=${GRPO_PYTHON:-$python}

if [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; then
    nproc=$1
    shift
elif [[ $# == 0 || $1 == -* ]]; then
    nproc=$("$python" -c "import torch; print(max(1, torch.cuda.device_count()))")
else
    echo "error: NPROC: must be a number >= 1, got $1. Usage: bash launch/single_node.sh [NPROC] [--key value ...]" >&2
    exit 2
fi
# exec: a signal to this script reaches torchrun, which passes it on.
exec "$python" "$root/launch/torchrun.py" --restarts "${GRPO_RESTARTS:-3}" --standalone --nproc_per_node="$nproc" "$root/train.py" "$@"
