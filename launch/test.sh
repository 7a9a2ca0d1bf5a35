#!/usr/bin/env bash
# Install, then format, lint, types and tests; offline once it is installed.
#
#     bash launch/test.sh [--full] [pytest arguments]        --full: the long tier
#
# Every check runs, whatever the one before it found. Exit code: pytest's, or 1 when only another check failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh --test
python=$PWD/.venv/bin/python
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

failed=()
for check in "ruff format --check ." "ruff check ." "mypy"; do
    echo "== $check"
    # shellcheck disable=SC2086  # the words of $check are its arguments
    "$python" -m $check || failed+=("$check")
done
echo "== pytest $*"
code=0
if (($#)); then
    "$python" -m pytest "$@" || code=$?
else # the short tier in two halves at once: most tests keep one core busy
    log=$(mktemp)
    trap 'rm -f "$log"' EXIT
    "$python" -m pytest --part 2 >"$log" 2>&1 &
    second=$!
    trap 'kill "$second" 2>/dev/null || true; exit 130' INT TERM
    "$python" -m pytest --part 1 || code=$?
    wait "$second" || code=$?
    cat "$log"
fi
if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}" >&2
    ((code)) || code=1
fi
exit "$code"
