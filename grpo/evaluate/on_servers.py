"""Let rollout servers answer in place of this process (docs/vllm.md): `--server` of evaluation and inference."""

from collections.abc import Sequence

from grpo.config.settings import Config
from grpo.errors import Lost
from grpo.evaluate.ask import CheckpointModel
from grpo.forward.logprobs import Scorer
from grpo.rollout.vllm.open import open_vllm
from grpo.runtime.distributed import World
from grpo.runtime.signals import Stopping
from grpo.training.score_rows import scorer_of


def answer_on_servers(model: CheckpointModel, servers: Sequence[str], world: World) -> None:
    """Send the checkpoint's weights to these servers and ask them from now on. Raises UserError."""
    own = model.engine
    cfg = Config(
        model=own.model.name_or_path,
        rollout_engine="vllm",
        rollout_server=list(servers),
        max_prompt_length=model.recipe.max_prompt_length,
        max_generate_length=model.max_new_tokens,
        stop=list(model.recipe.stop),
        logit_clamp=model.recipe.logit_clamp,
        seed=own.seed,
        dtype=own.dtype,  # type: ignore[arg-type]
    )
    scorer = Scorer(own.model, cfg)
    scorer.head.num_tokens = own.head.num_tokens

    score = scorer_of(scorer, own.model.device, scorer.shares_prompts, scorer.block_tokens)

    def fail(line: str) -> None:
        lost = Lost(line)
        lost.on_one_rank = True
        raise lost

    stop_ids = own.stop_ids.tolist()
    engine = open_vllm(cfg, world, own.model, stop_ids, own.head.num_tokens, model.tokenizer, score, Stopping(fail))
    engine.load_weights(own.model.named_parameters, 0)
    model.engine = engine
