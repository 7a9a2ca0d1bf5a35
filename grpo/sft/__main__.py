"""`torchrun ... -m grpo.sft`: supervised training (train.py)."""

import sys

from grpo.config.command_line import load_sft_config, refuse_bad_settings

if __name__ == "__main__":
    refuse_bad_settings(sys.argv[1:], load_sft_config)  # before the seconds that the imports below take

    from functools import partial

    from grpo.data.show_prompt import show_prompt
    from grpo.run.main import run_main
    from grpo.sft.texts import texts_to_show
    from grpo.sft.train import train_sft

    show = partial(show_prompt, load=load_sft_config, solve=texts_to_show)
    sys.exit(run_main(train_sft, load_sft_config, sys.argv[1:], show))
