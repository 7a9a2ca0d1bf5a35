#!/usr/bin/env bash
# What a first look at a GPU should show, in at most six minutes on one H100 or H200; parts, files, wheels: gpu_check.py.
#
#     bash benchmarks/gpu_check.sh [--only PART ...] [--budget SECONDS] [--model FILE.gguf] [--out FOLDER] [--device cpu]
#
# PYTHON=... names the interpreter. Needs no network. Exit code 1 when a part failed, or had no time left.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" -u -m benchmarks.gpu_check "$@"
