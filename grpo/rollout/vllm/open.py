"""Find or start the rollout servers of a run."""

import os
from collections.abc import Callable, Iterable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.config.settings import Config
from grpo.errors import UserError
from grpo.rollout import Weights
from grpo.rollout.vllm.client import Client, ServerProblem
from grpo.rollout.vllm.engine import Score, VllmEngine, check_facts
from grpo.rollout.vllm.wire import TOKEN_VARIABLE
from grpo.runtime.distributed import World


def open_vllm(
    cfg: Config,
    world: World,
    model: PreTrainedModel,
    stop_ids: Iterable[int],
    num_tokens: int,
    tokenizer: PreTrainedTokenizerBase,
    score: Score,
    fail: Callable[[str], None],
    merged: Weights | None = None,
) -> VllmEngine:
    """The engine, once every server answers and fits the model. Raises UserError, on every rank alike."""
    urls = [cfg.rollout_server] if isinstance(cfg.rollout_server, str) else list(cfg.rollout_server or [])
    token = os.environ.get(TOKEN_VARIABLE, "")
    problem: UserError | None = None
    clients = [Client(url, token, cfg.rollout_timeout_s) for url in urls]
    dtypes = []
    try:
        if not token:
            raise UserError(
                f"rollout_server: the environment variable {TOKEN_VARIABLE} must hold the secret that the server was "
                "started with, got nothing."
            )
        for client in clients:
            facts = client.wait()
            check_facts(facts, client.url, cfg, model.config)
            dtypes.append(facts["dtype"])
        if len(set(dtypes)) > 1:
            raise UserError(f"rollout_server: the servers compute in {', '.join(dtypes)}. Start all with one --dtype.")
    except UserError as error:
        problem = error
    except ServerProblem as error:
        problem = UserError(f"rollout_server: {error}")
    (failed,) = world.any_rank(problem is not None)
    if failed:
        raise problem or UserError("rollout_server: another rank cannot use it, see its error.")
    engine = VllmEngine(cfg, world, clients, stop_ids, num_tokens, tokenizer, score, fail, merged)
    engine.dtype = dtypes[0]
    return engine
