#!/usr/bin/env bash
# Start a rollout server for train.py (docs/vllm.md); it runs until it is stopped, and is started again when it dies.
#
#     bash launch/vllm_server.sh --model M [--gpus 2] [--host 0.0.0.0] [--port 8100] [vLLM's own flags]
#
# GRPO_SERVER_TOKEN holds the secret that trainers must know; without it a new one is made and written to
# runs/vllm_server.token, which only you can read. GRPO_VLLM_PYTHON names the Python that has vLLM, by default that of
# .venv-vllm (bash launch/setup_vllm.sh).
set -euo pipefail
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${GRPO_VLLM_PYTHON:-$project/.venv-vllm/bin/python}
max_restarts=5

say() { echo "vllm_server: $*"; }
die() { echo "error: $*" >&2; exit 2; }
[[ -x $python ]] || die "$python is missing. Make it with bash launch/setup_vllm.sh, or name another in GRPO_VLLM_PYTHON."
if [[ -z ${GRPO_SERVER_TOKEN:-} ]]; then
    file=${GRPO_TOKEN_FILE:-$project/runs/vllm_server.token}
    mkdir -p "$(dirname "$file")"
    rm -f "$file"
    (umask 077 && "$python" -c 'import secrets; print(secrets.token_hex(24))' >"$file")
    GRPO_SERVER_TOKEN=$(<"$file")
    say "a new secret is in $file; give it to the trainer: export GRPO_SERVER_TOKEN=\$(cat $file)"
fi
export GRPO_SERVER_TOKEN PYTHONPATH=$project VLLM_NO_USAGE_STATS=1

child=
trap 'kill -TERM "$child" 2>/dev/null; wait "$child"; exit 143' TERM
trap 'kill -INT "$child" 2>/dev/null; wait "$child"; exit 130' INT
for ((restart = 0; ; restart++)); do
    started=$SECONDS code=0
    "$python" -m grpo.rollout.vllm.server --die-with $$ "$@" &
    child=$!
    wait "$child" || code=$?
    # wrong arguments and early ends are not tried again; one long run makes up for earlier ends
    if ((code == 0 || code == 2 || SECONDS - started < 20)); then exit "$code"; fi
    if ((SECONDS - started > 3600)); then restart=0; fi
    if ((restart == max_restarts)); then die "the server ended $restart times, last with code $code."; fi
    say "the server ended with code $code; starting it again"
done
