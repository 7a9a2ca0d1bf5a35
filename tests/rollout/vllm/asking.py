"""The engine of vLLM's rollouts in this process, against stand-ins of its servers."""

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo.config.settings import Config
from grpo.forward.logprobs import Scorer
from grpo.models.loading import prepare
from grpo.models.names_in_files import NamesInFiles
from grpo.rollout import Request
from grpo.rollout.engine import NativeEngine
from grpo.rollout.sampling import sampling_of
from grpo.rollout.stop_strings import StopStrings
from grpo.rollout.vllm.client import Client
from grpo.rollout.vllm.engine import VllmEngine
from grpo.runtime.distributed import World
from grpo.runtime.signals import Stopping
from grpo.training.score_rows import scorer_of
from tests.support.rollout_server import TOKEN

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
PROMPTS = [tuple(range(5, 5 + length)) for length in (3, 20, 11)]


class Trainer:
    """A policy's model, and the engine that samples for it."""

    def __init__(self, folder, servers, token=TOKEN, stop_ids=(0, 7, 19), num_tokens=None, own=False, **settings):
        """own: as if the trainer had started the servers itself."""
        self.model = prepare(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        settings = {"rollout_timeout_s": 5.0, "max_generate_length": 12, "seed": 3} | settings
        urls = None if own else [server.url for server in servers]
        self.cfg = Config(rollout_engine="vllm", rollout_server=urls, **settings)
        self.scorer = Scorer(self.model, self.cfg)
        self.stop_ids = stop_ids
        self.num_tokens = num_tokens or self.model.config.get_text_config().vocab_size
        self.scorer.head.num_tokens = self.num_tokens
        self.score = scorer_of(
            self.scorer, torch.device("cpu"), True, self.scorer.block_tokens
        )  # as the trainer computes log-probs
        clients = [Client(server.url, token, self.cfg.rollout_timeout_s) for server in servers]
        self.problems: list[str] = []
        self.engine = VllmEngine(
            self.cfg,
            ALONE,
            clients,
            clients,
            stop_ids,
            self.num_tokens,
            self.tokenizer,
            self.score,
            Stopping(self.problems.append),
            dtype="float32",
            in_files=NamesInFiles(self.model),
        )
        self.updates = 0

    def update(self, size=0.02):
        """Change the weights."""
        self.updates += 1
        torch.manual_seed(self.updates)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=size)

    def send(self):
        """Send the weights, as each step does."""
        self.engine.load_weights(self.model.named_parameters, self.updates)

    def requests(self, num_generations=3):
        """Of a step."""
        places = [(p, g) for p in range(len(PROMPTS)) for g in range(num_generations)]
        return [Request(n, 10 + p, g, PROMPTS[p]) for n, (p, g) in enumerate(places)]

    def sample(self, sampling=None, **how):
        """A rollout."""
        return self.engine.generate(self.requests(), sampling or sampling_of(self.cfg), **how)

    def native(self, sampling=None):
        """The same by the native engine."""
        stop = StopStrings.of(self.tokenizer, self.cfg.stop)
        how = dict(num_tokens=self.num_tokens, stop_strings=stop)
        engine = NativeEngine(self.model, self.stop_ids, self.cfg.max_generate_length, self.cfg.seed, **how)
        return engine.generate(self.requests(), sampling or sampling_of(self.cfg))


def assert_equal(ours, theirs):
    """Completions with equal tokens, ends and supports, and log-probs to 1e-4."""
    assert [one.row for one in ours] == [one.row for one in theirs]
    assert len({tuple(one.token_ids) for one in theirs}) > len(theirs) // 4, "degenerate: nothing was compared"
    for own, other in zip(ours, theirs, strict=True):
        assert own.token_ids.tolist() == other.token_ids.tolist() and own.finish == other.finish
        np.testing.assert_allclose(own.sampler_logprobs, other.sampler_logprobs, atol=1e-4)
        if other.support is not None:
            assert own.support.tolist() == other.support.tolist()
