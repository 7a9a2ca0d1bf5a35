"""A script of the project on the emulated device: `start.py train|sft DEVICE [--key value ...]`; else on the CPU."""

import sys

import grpo.runtime.distributed
from tests import emulated


def on_device() -> None:
    """Make `pick_device` return the emulated device."""
    grpo.runtime.distributed.pick_device = lambda name, local_rank: emulated.register()


if __name__ == "__main__":
    script, device = sys.argv[1:3]
    if device == emulated.NAME:
        on_device()
    from grpo.config.command_line import load_config, load_sft_config
    from grpo.run.main import run_main

    if script == "train":
        from train import train

        sys.exit(run_main(train, load_config, sys.argv[3:]))
    if script == "sft":
        from grpo.sft.train import train_sft

        sys.exit(run_main(train_sft, load_sft_config, sys.argv[3:]))
    raise SystemExit(f"no such script: {script}")
