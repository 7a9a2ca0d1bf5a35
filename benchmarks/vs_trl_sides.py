"""One side of benchmarks/vs_trl.py: a real training run that takes a step whenever the parent says so.

    python -m benchmarks.vs_trl_sides ours|trl workload.json folder threads [our settings]

Reads `go` lines from stdin; after each step writes one JSON line to the file descriptor STEPS_FD names. Nothing is
simulated: ours is train.py's own loop, with a gate at the start of each step; TRL's is GRPOTrainer.train() with the
same gate in a callback. Times are the phases' own; tokens are counted at the embedding; memory is the highest
resident size since the first step began, above what was resident then (imports, weights and data are loaded); on a GPU,
of what its tensors take.
"""

import functools
import json
import os
import re
import sys
import time
from pathlib import Path

import torch

from benchmarks.workloads import Workload


def resident_mb(which: str) -> float:
    """VmRSS or VmHWM of this process, MB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{which}:\s+(\d+) kB", status)[1]) / 1024


class Memory:
    """The highest there has been, above what there was at first, MB."""

    def __init__(self, on_gpu: bool):
        self.on_gpu = on_gpu
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.idle_mb = torch.cuda.memory_allocated() / 2**20
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self.idle_mb = resident_mb("VmRSS")

    def peak_mb(self) -> float:
        """So far."""
        return (torch.cuda.max_memory_allocated() / 2**20 if self.on_gpu else resident_mb("VmHWM")) - self.idle_mb


class Gate:
    """Between two steps: report the last one, wait for the word, begin the next."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.out = os.fdopen(int(os.environ["STEPS_FD"]), "w")
        self.memory: Memory | None = None
        self.tokens = {"no_grad": 0, "grad": 0}
        self.found: dict[str, float] = {}

    def count(self, model) -> None:
        """Count the tokens that enter the model, with and without gradient."""

        def hook(module, args):
            self.tokens["grad" if torch.is_grad_enabled() else "no_grad"] += args[0].numel()

        model.get_input_embeddings().register_forward_pre_hook(hook)

    def __call__(self) -> None:
        """Report the step that ends here, if any, and wait until the next one may begin."""
        if self.on_gpu:
            torch.cuda.synchronize()
        if self.memory is None:
            self.memory = Memory(self.on_gpu)
        else:
            self.close(self.memory)
        if sys.stdin.readline().strip() != "go":
            os._exit(0)
        self.tokens.update(no_grad=0, grad=0)
        self.found = {}
        self.began = time.perf_counter()

    def close(self, memory: Memory) -> None:
        """Report the step that ends here."""
        report = {"step_s": time.perf_counter() - self.began, "peak_mb": memory.peak_mb()}
        print(json.dumps(report | self.tokens | self.found), file=self.out, flush=True)


def our_settings(work: Workload, folder: Path, threads: int) -> list[str]:
    """A workload as a command line of train.py."""
    settings = {
        "model": work.model,
        "data": work.data,
        "question_column": "prompt",
        "chat_template": False,
        "rewards": json.dumps({work.reward: 1.0}),
        "batch_size": work.prompts,
        "gradient_accumulation_steps": 1,
        "num_generations": work.group,
        "max_prompt_length": work.max_prompt,
        "max_generate_length": work.max_new,
        "max_steps": 100_000,
        "lr": work.lr,
        "temperature": work.temperature,
        "seed": work.seed,
        "save_steps": 0,
        "num_threads": threads,
        "backend": "ddp",
        "output_dir": folder / "output",
        "runs_dir": folder / "runs",
        "resume": "never",
        "report_to": "none",
        "stall_timeout_s": 86_400,  # waiting for the other side's turn is no stall
        "dtype": work.dtype,
        "device": work.device,
    }
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def ours(work: Workload, folder: Path, threads: int) -> None:
    """train.py, gated."""
    import train
    from grpo.config.command_line import load_config
    from grpo.run.main import run_main
    from grpo.run.run import Run

    gate = Gate(work.device)
    plain_tally, plain_load = Run.tally, train.load_policy
    plain_log = train.Run.__init__

    def tally(run, step):
        gate()
        return plain_tally(run, step)

    def load_policy(*args):
        policy = plain_load(*args)
        gate.count(policy.model)
        return policy

    def init(run, *args):
        plain_log(run, *args)
        log_step = run.log.log_step

        def logged(*args):
            metrics = log_step(*args)
            gate.found = {
                "rollout_s": metrics["time/rollout_s"],
                "update_s": metrics["time/update_s"],
                "reward_s": metrics["time/reward_s"],
                "new_tokens": metrics["completions/tokens"],
                "reward": metrics["reward/mean"],
            }
            return metrics

        run.log.log_step = logged

    Run.tally, Run.__init__, train.load_policy = tally, init, load_policy
    sys.exit(run_main(train.train, load_config, our_settings(work, folder, threads) + sys.argv[5:]))


def trl(work: Workload, folder: Path, threads: int) -> None:
    """TRL's GRPOTrainer at its fairest: no gradient checkpointing, no dropout, beta 0, no logging of texts."""
    import importlib.util

    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(threads)
    path, _, name = work.reward.rpartition(":")
    spec = importlib.util.spec_from_file_location("rewards", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    reward = getattr(module, name)

    @functools.wraps(reward)
    def rewarded(*args, **kwargs):
        scores = reward(*args, **kwargs)
        gate.found["reward"] = sum(scores) / len(scores)
        return scores

    rows = [json.loads(line) for line in Path(work.data).read_text(encoding="utf-8").splitlines()]
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=work.trl_rows,
        gradient_accumulation_steps=work.prompts * work.group // work.trl_rows,
        num_generations=work.group,
        max_completion_length=work.max_new,
        max_steps=100_000,
        learning_rate=work.lr,
        lr_scheduler_type="constant",
        seed=work.seed,
        bf16=work.dtype == "bf16",
        use_cpu=work.device == "cpu",
        gradient_checkpointing=False,
        report_to="none",
        logging_steps=1000,
        disable_tqdm=True,
        save_strategy="no",
        beta=0.0,
        disable_dropout=True,
        loss_type="grpo",
        temperature=work.temperature,
        top_k=0,
        top_p=1.0,
    )
    gate = Gate(work.device)

    class Gated(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            gate()

    class Timed(GRPOTrainer):
        def _generate(self, *args, **kwargs):
            start = time.perf_counter()
            made = super()._generate(*args, **kwargs)
            gate.found["rollout_s"] = gate.found.get("rollout_s", 0.0) + time.perf_counter() - start
            gate.found["new_tokens"] = gate.found.get("new_tokens", 0) + sum(map(len, made[1]))
            return made

        def _generate_and_score_completions(self, *args, **kwargs):
            start = time.perf_counter()
            made = super()._generate_and_score_completions(*args, **kwargs)
            gate.found["before_update_s"] = gate.found.get("before_update_s", 0.0) + time.perf_counter() - start
            return made

    trainer = Timed(
        model=AutoModelForCausalLM.from_pretrained(
            work.model, dtype=torch.bfloat16 if work.dtype == "bf16" else torch.float32
        ),
        reward_funcs=rewarded,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(work.model),
        callbacks=[Gated()],
    )
    gate.count(trainer.model)
    trainer.train()


if __name__ == "__main__":
    _, which, described, place, num_threads, *_ = sys.argv
    sys.stdout = sys.stderr
    {"ours": ours, "trl": trl}[which](Workload(**json.loads(described)), Path(place), int(num_threads))
