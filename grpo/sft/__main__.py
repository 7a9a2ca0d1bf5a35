"""`torchrun ... -m grpo.sft`: supervised training (train.py)."""

import sys

from grpo.config.command_line import load_sft_config, refuse_bad_settings

if __name__ == "__main__":
    refuse_bad_settings(sys.argv[1:], load_sft_config)  # before the seconds that the imports below take

    from grpo.run.main import run_main
    from grpo.sft.train import train_sft

    sys.exit(run_main(train_sft, load_sft_config, sys.argv[1:]))
