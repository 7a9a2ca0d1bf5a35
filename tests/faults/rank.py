"""train.py with the faults that GRPO_FAULTS says."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import train
from grpo.config.command_line import load_config
from grpo.run.main import run_main
from tests.faults.fault import FAULTS, from_json
from tests.faults.inject import install

if __name__ == "__main__":
    install(from_json(os.environ.get(FAULTS, "[]")), int(os.environ.get("RANK", 0)))
    sys.exit(run_main(train.train, load_config, sys.argv[1:]))
