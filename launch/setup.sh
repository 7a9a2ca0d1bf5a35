#!/usr/bin/env bash
# Make .venv in the project's folder and install into it. Safe to run again: what is there is reused.
#
#     bash launch/setup.sh            what training needs
#     bash launch/setup.sh --test     and what the tests need
#
# GRPO_PYTHON names the Python that .venv is made with; without it, the first of python3, python3.13, ... on PATH
# that is new enough.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
cpu_index=https://download.pytorch.org/whl/cpu
python=.venv/bin/python
unfinished=.venv/setup-unfinished

say() { echo "setup: $*"; }
die() { echo "error: $*" >&2; exit 2; }

case ${1:-} in
    "") what="." stamp=.venv/setup-done ;;
    --test) what=".[test]" stamp=.venv/setup-done-test ;;
    *) die "setup.sh: unknown argument $1. Allowed: --test, or nothing." ;;
esac

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

find_python() {
    local name
    if [[ -n ${GRPO_PYTHON:-} ]]; then
        if new_enough "$GRPO_PYTHON"; then echo "$GRPO_PYTHON"; return; fi
        die "Python 3.10 or newer is needed; GRPO_PYTHON=$GRPO_PYTHON is older, or no Python. Name another one."
    fi
    for name in python3 python3.13 python3.12 python3.11 python3.10; do
        if new_enough "$name"; then echo "$name"; return; fi
    done
    die "Python 3.10 or newer is needed, found: $(python3 --version 2>&1 || true)." \
        "Install one, or name it: GRPO_PYTHON=/path/to/python3."
}

# What the installation depends on: a change of any of it means installing again. The folder is part of it, because
# the scripts in .venv/bin hold its path. Settings of ruff, mypy and pytest (the end of pyproject.toml) are not.
fingerprint() { { pwd -P; sed '/^\[tool\.ruff\]/,$d' pyproject.toml; cat constraints.txt; } | cksum; }

has_pip() { "$python" -m pip --version || "$python" -m ensurepip; }

has_gpu() { [[ -e /dev/nvidia0 ]] || nvidia-smi -L; }

pip_install() {
    local quiet=(-qq)
    if [[ -t 1 ]]; then quiet=(); fi  # someone is watching: show what is being downloaded
    # PIP_USER would put things outside .venv. deepspeed compiles nothing now: what a run needs, it builds then.
    PIP_USER=0 DS_BUILD_OPS=0 "$python" -m pip install ${quiet[@]+"${quiet[@]}"} \
        --no-input --disable-pip-version-check -c constraints.txt "$@"
}

# Two scripts started together take turns.
if command -v flock >/dev/null; then exec 9<launch/setup.sh; flock 9; fi

if [[ -e $unfinished ]]; then
    say "the last installation into .venv was interrupted: starting it anew"
    rm -rf .venv
elif [[ -e .venv || -L .venv ]] && ! { "$python" -c "" && has_pip; } >/dev/null 2>&1; then
    say ".venv does not work: making it anew"
    rm -rf .venv
fi
if [[ -e $python ]]; then
    new_enough "$python" || die ".venv holds $("$python" --version), 3.10 or newer is needed. Delete .venv, run again."
    for old in "$stamp" .venv/setup-done-test; do  # the one for the tests covers both
        if [[ -e $old && $(<"$old") == "$(fingerprint)" ]]; then say "reusing .venv, nothing changed"; exit; fi
    done
    say "reusing .venv; pyproject.toml, constraints.txt or the folder changed, or something is not in it yet"
    touch "$unfinished"
else
    base=$(find_python)
    say "making .venv with $("$base" --version)"
    mkdir .venv
    touch "$unfinished"
    "$base" -m venv .venv || die "$base cannot make virtual environments (on Debian and Ubuntu: install python3-venv)."
fi

trap 'exit 130' INT TERM  # pip turns Ctrl-C into an ordinary failure; this one must leave the mark
failed() {
    rm -f "$unfinished"  # pip gave up in good order: .venv is as it was, and the next run continues from here
    die "$1 could not be installed; pip says why above. Running the same command again continues."
}
# torch first: it is the big one, and deepspeed wants to see it. Elsewhere than on Linux the package index has the
# CPU build already; on Linux it has the CUDA one, several GB that a machine without a GPU cannot use.
if [[ $(uname) == Linux ]] && ! has_gpu >/dev/null 2>&1; then
    say "no NVIDIA GPU here: trying PyTorch's CPU build first"
    cpu=(--index-url "$cpu_index" --retries 0)
    if ! "$python" -m pip index versions torch "${cpu[@]}" --timeout 5 >/dev/null 2>&1 ||
        ! pip_install --no-deps torch "${cpu[@]}" --timeout 60; then
        say "it cannot be had from PyTorch's CPU index: taking torch from the package index (may be the larger build)"
    fi
fi
say "installing torch, then the rest (minutes, the first time)"
pip_install torch || failed torch
pip_install -e "$what" || failed "the project"
rm -f .venv/setup-done*
fingerprint >"$stamp"
rm -f "$unfinished"
say "done"
