#!/usr/bin/env bash
# From nothing to a trained model: install, train the demo on two processes, ask the result a question.
#
#     bash launch/quickstart.sh [train.py settings]        NPROC=1 for one process
#
# Running it again reuses .venv and continues from the newest checkpoint. Exit code: the trainer's (launch/torchrun.py).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
nproc=${NPROC:-2}
[[ $nproc =~ ^[1-9][0-9]*$ ]] || { echo "error: NPROC: must be a number >= 1, got $nproc." >&2; exit 2; }

bash launch/setup.sh
python=.venv/bin/python
output=output runs=runs previous=
for arg; do
    case $previous in --output_dir) output=$arg ;; --runs_dir) runs=$arg ;; esac
    case $arg in --output_dir=*) output=${arg#*=} ;; --runs_dir=*) runs=${arg#*=} ;; esac
    previous=$arg
done

echo "training: torchrun --standalone --nproc_per_node=$nproc train.py${*:+ $*}"
"$python" launch/torchrun.py --standalone --nproc_per_node="$nproc" train.py "$@"

question=$("$python" -c 'import json; print(json.loads(input())["question"])' <demo/test.jsonl)
echo "asking it a question it was not trained on: python inference.py \"$question\""
"$python" inference.py --output_dir "$output" "$question"

echo "The curves: .venv/bin/tensorboard --logdir \"$runs\", then open http://localhost:6006"
