"""Find or start the rollout servers of a run."""

import os
from collections.abc import Iterable

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.config.settings import Config
from grpo.errors import UserError, warn
from grpo.models.names_in_files import NamesInFiles
from grpo.rollout import Weights
from grpo.rollout.vllm.child import ChildServer
from grpo.rollout.vllm.client import Client, ServerProblem
from grpo.rollout.vllm.engine import Score, VllmEngine, check_facts
from grpo.rollout.vllm.wire import TOKEN_VARIABLE
from grpo.runtime.distributed import World
from grpo.runtime.signals import Stopping


def open_vllm(
    cfg: Config,
    world: World,
    model: PreTrainedModel,
    stop_ids: Iterable[int],
    num_tokens: int,
    tokenizer: PreTrainedTokenizerBase,
    score: Score,
    stopping: Stopping,
    merged: Weights | None = None,
) -> VllmEngine:
    """The engine, once every server answers and fits the model. Raises UserError, on every rank alike."""
    problem: UserError | None = None
    clients: list[Client] = []
    try:
        in_files = NamesInFiles(model)
        if cfg.rollout_server is None:
            clients, owns = _own_server(cfg, world, model, tokenizer)
        else:
            clients, owns = _running_servers(cfg), world.is_main
        dtypes = []
        for client in clients:
            client.notice = warn if world.is_main else None
            facts = client.wait()
            check_facts(facts, client.url, cfg, model.config, tokenizer)
            dtypes.append(facts["dtype"])
        if len(set(dtypes)) > 1:
            raise UserError(f"rollout_server: they compute in {', '.join(dtypes)}. Start all with one --dtype.")
    except UserError as error:
        problem = error
    except ServerProblem as error:
        problem = UserError(f"rollout_server: {error}")
    (failed,) = world.any_rank(problem is not None)
    if failed:
        raise problem or UserError("rollout_server: another rank cannot use it, see its error.")
    owned = clients if owns else []
    return VllmEngine(
        cfg, world, clients, owned, stop_ids, num_tokens, tokenizer, score, stopping, dtypes[0], merged, in_files
    )


def _running_servers(cfg: Config) -> list[Client]:
    """Those that the setting names. Raises UserError without a token."""
    urls = [cfg.rollout_server] if isinstance(cfg.rollout_server, str) else cfg.rollout_server or []
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not token:
        raise UserError(
            f"rollout_server: the environment variable {TOKEN_VARIABLE} must hold the secret that the server was "
            "started with, got nothing."
        )
    return [Client(url, token, cfg.rollout_timeout_s) for url in urls]


def _own_server(
    cfg: Config, world: World, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Client], bool]:
    """This rank's server, and whether it started it: one for each GPU, or for all ranks of a machine without GPUs.

    Raises UserError.
    """
    starts = world.device.type == "cuda" or world.local_rank == 0
    problem: UserError | None = None
    place = np.zeros(1 + 8)  # port; the token, 16 bits in each number
    if starts:
        try:
            server = ChildServer(cfg, world, model, tokenizer)
            place[0] = server.port
            place[1:] = [int(server.token[at : at + 4], 16) for at in range(0, 32, 4)]
        except UserError as error:
            problem = error
    rows = world.gather_rows(place)  # every rank waits here until all servers listen
    port, *words = rows[world.rank if starts else world.rank - world.local_rank].astype(int).tolist()
    if problem is not None:
        raise problem
    if not port:
        raise UserError("rollout_engine: the vLLM server of this machine did not start, see the error of its rank.")
    token = "".join(f"{word:04x}" for word in words)
    return [Client(f"http://127.0.0.1:{port}", token, cfg.rollout_timeout_s)], starts
