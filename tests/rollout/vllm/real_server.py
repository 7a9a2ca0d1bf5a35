"""A real rollout server, vLLM's, with a tiny model; and its processes."""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from grpo.rollout.vllm.child import PYTHON_VARIABLE
from grpo.rollout.vllm.wire import TOKEN_VARIABLE
from tests.support.jobs import PROJECT, wait_for
from tests.support.rollout_server import TOKEN
from tests.support.tiny import tiny_config, tiny_tokenizer

PYTHON = Path(os.environ.get(PYTHON_VARIABLE, PROJECT / ".venv-vllm" / "bin" / "python"))
START_S = 900.0  # on a busy machine; a minute on a quiet one


def save_served(folder: Path, architecture: str, seed: int = 0, spread: float = 2.0) -> Path:
    """A tiny model whose heads have 32 dimensions: vLLM's attention on CPU has no smaller ones."""
    tokenizer = tiny_tokenizer()
    config = tiny_config(architecture, len(tokenizer))
    config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim = 64, 4, 2, 32
    config.intermediate_size = 96
    if architecture == "qwen3_moe":
        config.moe_intermediate_size = 32
    if architecture == "gemma3":
        config.query_pre_attn_scalar = 32
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(spread)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class RealServer:
    """launch/vllm_server.sh, which starts the server again when it dies, at a free port of loopback."""

    def __init__(self, model: Path, folder: Path, *flags: str):
        with socket.socket() as probing:
            probing.bind(("127.0.0.1", 0))
            self.port = probing.getsockname()[1]
        self.url, self.log, self.port_file = f"http://127.0.0.1:{self.port}", folder / "log", folder / "port"
        command = ["bash", str(PROJECT / "launch" / "vllm_server.sh"), "--model", str(model), "--dtype", "float32"]
        command += ["--port", str(self.port), "--port-file", str(self.port_file), "--keep", str(folder / "kept")]
        command += ["--max-model-len", "256", "--enforce-eager", *flags]
        own = {
            TOKEN_VARIABLE: TOKEN,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            PYTHON_VARIABLE: str(PYTHON),
        }
        with self.log.open("wb") as log:
            self.script = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | own, cwd=PROJECT)
        self.wait()

    def wait(self) -> None:
        """Until it listens."""
        wait_for(lambda: self.port_file.exists() or self.script.poll() is not None, START_S)
        assert self.script.poll() is None, self.log.read_text()[-3000:]

    def processes(self) -> dict[int, str]:
        """Process -> command, of the server and of vLLM's engine."""
        return processes_with(str(self.port_file))

    def kill(self, engine: bool) -> None:
        """SIGKILL to vLLM's engine, or to the server."""
        self.port_file.unlink()
        mark = "EngineCore" if engine else "-m grpo.rollout.vllm.server"
        found = {pid: command for pid, command in self.processes().items() if mark in command}
        assert found, self.processes()
        os.kill(min(found), signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM to the script, as an operator does."""
        if self.script.poll() is None:
            self.script.terminate()
            self.script.wait(60)


def processes_with(text: str) -> dict[int, str]:
    """Processes of the groups whose leader has this text in its command line, but shells. Process -> command."""
    found: dict[int, tuple[int, str]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = Path(f"/proc/{name}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            if state[0] != "Z" and not command.startswith("bash "):
                found[int(name)] = (int(state[2]), command)
        except OSError:
            continue
    groups = {group for group, command in found.values() if text in command and "grpo.rollout.vllm.server" in command}
    return {pid: command for pid, (group, command) in found.items() if group in groups}


def group_members(group: int) -> list[int]:
    """Processes of a group that run."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            state = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if state[0] != "Z" and int(state[2]) == group:
            found.append(int(name))
    return found


def is_free(port: int) -> bool:
    """Whether a server could listen there."""
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def wait_until_gone(group: int, seconds: float = 30.0) -> None:
    """Until no process of a group is left."""
    until = time.monotonic() + seconds
    while group_members(group):
        assert time.monotonic() < until, f"orphans: {group_members(group)}"
        time.sleep(0.1)
