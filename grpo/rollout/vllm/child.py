"""A rollout server that a rank starts itself, in vLLM's own environment and on this rank's own devices.

It listens on loopback, with a secret that nobody else is told, ends with the rank, and is started again when it dies.
"""

import atexit
import os
import secrets
import subprocess
import threading
import time
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.config.settings import PROJECT, Config
from grpo.errors import UserError, warn
from grpo.rollout.vllm.wire import TOKEN_VARIABLE
from grpo.runtime.distributed import World

PYTHON_VARIABLE = "GRPO_VLLM_PYTHON"
START_S = 1800.0  # for the first start; large models are compiled and captured
MAX_RESTARTS = 3
MEMORY_SHARE = 0.3  # of a GPU, beside the trainer; vllm_args follow, and so may say another
OF_THE_RANK = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC", "OMP_NUM_THREADS")


class ChildServer:
    """The process, and its place: a folder with its log, its model's description and its last weights."""

    def __init__(self, cfg: Config, world: World, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        """Start it and wait until it listens. Raises UserError."""
        self.folder = Path(cfg.output_dir) / ".vllm" / f"rank_{world.rank}"
        described = self.folder / "model"
        described.mkdir(parents=True, exist_ok=True)
        model.config.save_pretrained(described)
        tokenizer.save_pretrained(described)
        self.token, self.port, self.restarts = secrets.token_hex(16), 0, 0
        self.port_file, self.log = self.folder / "port", self.folder / "log"
        tokens = (
            cfg.max_prompt_length or model.config.get_text_config().max_position_embeddings
        ) + cfg.max_generate_length
        dtype = "float32" if cfg.dtype == "fp32" else "bfloat16"
        self.flags = ["--model", described, "--load-format", "dummy", "--dtype", dtype, "--max-model-len", tokens]
        self.flags += ["--keep", self.folder / "kept", "--port-file", self.port_file, "--die-with", os.getpid()]
        if world.device.type == "cpu":
            self.flags.append("--enforce-eager")
        else:
            self.flags += ["--gpu-memory-utilization", MEMORY_SHARE]
        self.flags += cfg.vllm_args
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(OF_THE_RANK)},
            TOKEN_VARIABLE: self.token,
            "PYTHONPATH": str(PROJECT),
            "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        if world.device.type == "cuda":
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            index = world.device.index or 0
            self.environment["CUDA_VISIBLE_DEVICES"] = (
                visible[index] if index < len(visible) and visible[0] else str(index)
            )
        self.process = self._start()
        self._wait()
        atexit.register(self.stop)
        threading.Thread(target=self._restart_when_dead, name="rollout server", daemon=True).start()

    def _start(self) -> "subprocess.Popen[bytes]":
        self.port_file.unlink(missing_ok=True)
        command = [python_of_vllm(), "-m", "grpo.rollout.vllm.server", "--port", str(self.port), *map(str, self.flags)]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command, env=self.environment, cwd=PROJECT, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def _wait(self) -> None:
        """Until it listens. Raises UserError."""
        until = time.monotonic() + START_S
        while not self.port_file.exists():
            code = self.process.poll()
            if code is not None or time.monotonic() > until:
                self.stop()
                how = f"ended with code {code}" if code is not None else f"is not ready after {START_S:g} s"
                raise UserError(f"rollout_engine: the vLLM server {how}. Its reason stands at the end of {self.log}.")
            time.sleep(0.2)
        self.port = int(self.port_file.read_text(encoding="utf-8"))

    def _restart_when_dead(self) -> None:
        while True:
            code = self.process.wait()
            if self.stopping or self.restarts == MAX_RESTARTS:
                return
            self.restarts += 1
            warn(f"warning: the vLLM server at port {self.port} ended with code {code}; starting it again ({self.log})")
            self.process = self._start()

    stopping = False

    def stop(self) -> None:
        """End it."""
        self.stopping = True
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()


def python_of_vllm() -> str:
    """The interpreter of the environment that has vLLM. Raises UserError."""
    named = os.environ.get(PYTHON_VARIABLE)
    python = Path(named) if named else PROJECT / ".venv-vllm" / "bin" / "python"
    if not python.exists():
        raise UserError(
            f"rollout_engine: vllm needs an environment of its own, {python} is missing. Make it with "
            f"bash launch/setup_vllm.sh, or name the Python of another one in {PYTHON_VARIABLE}."
        )
    return str(python)
