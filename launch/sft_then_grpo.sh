#!/usr/bin/env bash
# Both stages that one file describes: supervised training (its sft: section), then GRPO on the result.
#
#     bash launch/sft_then_grpo.sh [NPROC] --config file.yaml [settings of both stages] [-- settings of GRPO alone]
#
# Settings of the first stage alone belong into the sft: section. An --output_dir or --run_name given here is GRPO's;
# the first stage adds _sft to it, as it does to those of the file. Running the same again goes on where it stopped: a
# stage that is done says so. Exit code: the trainer's (launch/torchrun.py), of the stage that did not end well.
# NPROC, Python and GRPO_RESTARTS: as in single_node.sh.
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
    echo "error: NPROC: must be a number >= 1, got $1. Usage: bash launch/sft_then_grpo.sh [NPROC] --config file.yaml" >&2
    exit 2
fi

first=() second=() previous='' alone=''
for arg; do
    if [[ $arg == -- && -z $alone ]]; then
        alone=yes
        continue
    fi
    second+=("$arg")
    [[ -z $alone ]] || continue
    case $previous in --output_dir | --run_name) arg=${arg%/}_sft ;; esac
    case $arg in --output_dir=* | --run_name=*) arg=${arg%/}_sft ;; esac
    first+=("$arg")
    previous=$arg
done

# A signal to this script reaches torchrun, which passes it on; then the trainer saves and ends by itself.
stage() {
    local code=0
    echo "stage: $*"
    PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} "$python" "$root/launch/torchrun.py" --restarts "${GRPO_RESTARTS:-3}" \
        --standalone --nproc_per_node="$nproc" "$@" &
    local child=$!
    trap 'stopped=yes; kill -TERM "$child" 2>/dev/null || true' TERM INT
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do # the wait was ended by a signal, the stage was not
        wait "$child" || true
    done
    if [[ -n ${stopped:-} ]]; then # its own code, not that of the wait
        code=0
        wait "$child" || code=$?
    fi
    [[ $code == 0 ]] || exit "$code"
    [[ -z ${stopped:-} ]] || exit 143
}

stage -m grpo.sft ${first[@]+"${first[@]}"}
taught=$(PYTHONPATH=$root "$python" - ${first[@]+"${first[@]}"} <<'PYTHON'
import sys
from pathlib import Path

from grpo.checkpoints.contents import newest_valid
from grpo.config.command_line import load_sft_config

cfg, _ = load_sft_config(sys.argv[1:])
folder = newest_valid(Path(cfg.output_dir), lambda line: print(line, file=sys.stderr))
if folder is None:
    sys.exit(f"error: {cfg.output_dir} holds no valid checkpoint of the first stage.")
print(folder)
PYTHON
)
stage "$root/train.py" ${second[@]+"${second[@]}"} --model "$taught" --model_revision null
