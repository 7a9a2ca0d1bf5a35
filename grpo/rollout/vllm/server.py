"""A rollout server: vLLM behind a few routes, for train.py on this machine or others.

    GRPO_SERVER_TOKEN=... python -m grpo.rollout.vllm.server --model M [--host 127.0.0.1] [--port 8100] [vLLM's flags]

    GET  /health      what is served, and the version of its weights
    POST /generate    requests in, completions out as they end, one JSON object a line
    POST /weights     a stream of tensors (wire.py): all of them are loaded, or none
    POST /group       enter a trainer's process group (broadcast.py)
    POST /broadcast   load the weights that the group's trainer broadcasts
    POST /sleep       free the device's memory until the next of these two (vLLM's --enable-sleep-mode)

Every route wants the token, also one that does not exist. A request names the version of the weights that it is for;
another version answers 409, so nothing is ever sampled with weights that the trainer does not know. The last weights
are kept in a file: a server that is started again at the same place loads them, and a trainer that waits goes on.
"""

import asyncio
import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

import uvicorn
import vllm
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM

from grpo.rollout.vllm.routes import Guard, app_of
from grpo.rollout.vllm.wire import (
    DRAW,
    IN_SUPPORT,
    PROTOCOL,
    TOKEN_VARIABLE,
    describe,
    index_of,
    packed,
    packed_support,
    unpacked,
    vocabulary_of,
)

INSIDE = "grpo.rollout.vllm.inside"
STREAM_INTERVAL = 64  # tokens of a completion between two reports of its progress
PROGRESS_S = 0.5  # between two lines of /generate at most
PR_SET_PDEATHSIG = 1
NOT_LOADED = ""  # the version of weights that no trainer has sent
NO_GROUP = ""


class Server:
    """vLLM's engine, and the version of its weights."""

    def __init__(self, engine: AsyncLLM, kept: Path):
        self.engine, self.kept, self.arriving = engine, kept, kept.with_suffix(".arriving")
        self.version, self.group = NOT_LOADED, NO_GROUP
        self.running: set[asyncio.Task[None]] = set()
        self.loading = asyncio.Lock()
        self.asleep, self.turning = False, asyncio.Lock()
        self.numbers = iter(range(2**63))
        self.vocabulary = ""  # not known
        with contextlib.suppress(Exception):  # of a tokenizer of another kind: only stop strings need this
            self.vocabulary = vocabulary_of(engine.get_tokenizer())

    def facts(self) -> dict[str, Any]:
        """What a trainer compares with its own model."""
        model, parallel = self.engine.vllm_config.model_config, self.engine.vllm_config.parallel_config
        text = model.hf_text_config
        named = {name: getattr(text, name, None) for name in ("hidden_size", "num_hidden_layers", "vocab_size")}
        return {
            "protocol": PROTOCOL,
            "vllm": vllm.__version__,
            "model": model.model,
            "architecture": next(iter(model.hf_config.architectures or [""])),
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_model_len": model.max_model_len,
            "version": self.version,
            "unfinished": len(self.running),
            "loading": self.loading.locked(),
            "vocabulary": self.vocabulary,
            "sleeps": model.enable_sleep_mode,
            "device": current_platform.device_type,
            "copies": len(self.engine.engine_core.core_engines),
            "processes": parallel.world_size * parallel.data_parallel_size,
            **named,
        }

    async def sample(self, given: dict[str, Any], lines: "asyncio.Queue[dict[str, Any] | None]") -> None:
        """Sample the completions of a call of /generate; each ends as a line."""
        prompts = [unpacked(text, "<i4").tolist() for text in given["prompts"]]
        counts: dict[int, int] = {}
        base = sampling_params(given["support_width"], given["stop_ids"], given["stop"])
        copies = len(self.engine.engine_core.core_engines)

        async def one(key: int, prompt: int, limit: int, *keys: int) -> None:
            params = base.clone()
            params.max_tokens = limit
            params.extra_args = {DRAW: [*keys, given["num_tokens"], *given["sampling"]]}
            ids, logprobs, support, reason = list[int](), list[float](), list[list[int]](), "length"
            request = {"prompt_token_ids": prompts[prompt]}
            copy = key % copies if given["each_copy"] else None
            name = f"grpo-{next(self.numbers)}"
            async for output in self.engine.generate(request, params, name, data_parallel_rank=copy):
                (part,) = output.outputs
                for place, token in enumerate(part.token_ids):
                    found = part.logprobs[place]
                    logprobs.append(found[token].logprob)
                    if base.logprobs:
                        support.append(sorted(i for i, kept in found.items() if kept.logprob > 2 * IN_SUPPORT))
                ids += part.token_ids
                counts[key] = len(ids)
                reason = part.finish_reason or reason
            line: dict[str, Any] = {"key": key, "finish": reason, "version": self.version}
            line |= {"tokens": packed(ids, "<i4"), "logprobs": packed(logprobs, "<f4")}
            if base.logprobs:
                line |= packed_support(support)
            lines.put_nowait(line)

        async def progress() -> None:
            while True:
                await asyncio.sleep(PROGRESS_S)
                lines.put_nowait({"progress": sum(counts.values())})

        ticker = asyncio.create_task(progress())
        rows = [asyncio.create_task(one(*request)) for request in given["requests"]]
        try:
            await asyncio.gather(*rows)
            lines.put_nowait({"done": True})
        except Exception as error:
            lines.put_nowait({"error": describe(error)})
        finally:
            for task in (ticker, *rows):
                task.cancel()
            lines.put_nowait(None)

    async def load_stored(self, version: str) -> dict[str, Any]:
        """Load the stream that has arrived, and keep it. Raises BadStream, with everything as it was, and as `load`."""
        answer = await self.load_file(self.arriving, version)
        named = self.kept.with_suffix(".version")
        named.unlink(missing_ok=True)  # so that no weights are ever kept under the name of others
        self.arriving.replace(self.kept)
        partial = named.with_suffix(".partial")
        partial.write_text(version, encoding="utf-8")
        partial.replace(named)
        return answer

    async def load_file(self, file: Path, version: str) -> dict[str, Any]:
        """Load a stored stream. Raises as `load_stored`."""
        index_of(file)
        return await self.load("receive_weights", str(file), version)

    async def join(self, place: dict[str, Any]) -> dict[str, Any]:
        """Enter a trainer's process group (broadcast.py). Raises what the workers raise."""
        await self.wake()
        self.group = NO_GROUP
        await self.on_all("join_group", place)
        self.group = place["name"]
        return {"group": self.group}

    async def load_broadcast(self, group: str, number: int, version: str) -> dict[str, Any]:
        """Load the weights that a trainer broadcasts. Raises as `load`."""
        if group != self.group:
            raise ValueError("it is not in the trainer's process group")
        self.kept.unlink(missing_ok=True)  # no longer the last weights
        try:
            return await self.load("receive_broadcast", number, version)
        except Exception:
            self.group = NO_GROUP
            raise

    async def on_all(self, method: str, argument: Any) -> None:
        """A method of inside.py on every process of vLLM. Raises RuntimeError with the first problem."""
        core = self.engine.engine_core
        for _ in range(1000):  # copies of a model wait for each other in every step, until all have nothing to do
            if not core.dp_engines_running():
                break
            await asyncio.sleep(0.01)
        engines = await core.call_utility_all_async("collective_rpc", method, None, (argument,), None)
        problem = next((found for workers in engines for found in workers if found is not None), None)
        if problem is not None:
            raise RuntimeError(problem)

    async def load(self, method: str, argument: Any, version: str) -> dict[str, Any]:
        """Load weights by a method of inside.py. Requests that are running are ended first.

        Raises RuntimeError; then no weights count as loaded.
        """
        await self.wake()
        for task in self.running:
            task.cancel()
        await asyncio.gather(*self.running, return_exceptions=True)
        start, self.version = time.monotonic(), NOT_LOADED
        await self.on_all(method, argument)
        for _ in range(100):  # a request that was ended still holds its part of the cache for a moment
            if await self.engine.reset_prefix_cache():
                break
            await asyncio.sleep(0.05)
        else:
            raise RuntimeError("the prefix cache could not be emptied")
        self.version = version
        return {"version": version, "seconds": time.monotonic() - start}

    async def sleep(self) -> None:
        """Move the weights to CPU memory and free the cache."""
        async with self.turning:
            if not self.asleep:
                await self.engine.reset_prefix_cache()
                await self.engine.sleep(level=1)
                self.asleep = True

    async def wake(self) -> None:
        """The opposite, where it sleeps."""
        async with self.turning:
            if self.asleep:
                await self.engine.wake_up()
                self.asleep = False

    async def restore(self) -> None:
        """Load what the last server at this place was sent last."""
        version = self.kept.with_suffix(".version")
        if self.kept.exists() and version.exists():
            try:
                await self.load_file(self.kept, version.read_text(encoding="utf-8"))
                print(f"rollout server: weights {self.version} of the last run are loaded again", flush=True)
            except Exception as error:
                print(f"rollout server: the last weights are not used: {describe(error)}", file=sys.stderr, flush=True)


def sampling_params(support_width: int, stop_ids: list[int], stop: list[str]) -> SamplingParams:
    """vLLM's parameters: what ends a row, and how many ids come back. The distribution is that of inside.py."""
    return SamplingParams(
        temperature=1.0,
        logprobs=support_width,
        ignore_eos=True,  # the trainer's stop ids alone end a row
        stop_token_ids=stop_ids,
        stop=stop or None,
        include_stop_str_in_output=True,
        detokenize=bool(stop),
        skip_special_tokens=False,
        flat_logprobs=False,
        output_kind=RequestOutputKind.DELTA,
    )


def parse(argv: list[str]) -> Any:
    """The command line: own flags, and all of vLLM's engine."""
    parser = FlexibleArgumentParser(prog="python -m grpo.rollout.vllm.server", description=__doc__.split("\n")[0])
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; beyond loopback, trust the network")
    parser.add_argument("--port", type=int, default=8100, help="0: a free one")
    parser.add_argument("--gpus", type=int, help="copies of the model, one a GPU (vLLM's --data-parallel-size)")
    parser.add_argument("--keep", type=Path, help="folder for the last weights (default: one in the temporary folder)")
    parser.add_argument("--die-with", type=int, metavar="PID", help="end when this process, which started it, has died")
    parser.add_argument("--port-file", type=Path, help="file that gets the port once the server is ready")
    AsyncEngineArgs.add_cli_args(parser)
    return parser.parse_args(argv)


def lead_a_group() -> None:
    """Make this process the leader of a group, which is killed when it has ended, even by SIGKILL.

    vLLM's processes would live on, with the model in memory.
    """
    if os.getpgid(0) != os.getpid():
        os.setpgid(0, 0)
    command = ["bash", "-c", 'read -r; kill -9 -- "-$1" 2>/dev/null', "bash", str(os.getpid())]
    subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)  # its stdin ends with this process
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # a forked process would hold that pipe open


def ancestors() -> list[int]:
    """The parent of this process, its parent, and so on."""
    found = [os.getppid()]
    while found[-1] > 1:
        status = Path(f"/proc/{found[-1]}/stat").read_text(encoding="utf-8", errors="replace")
        found.append(int(status.rpartition(")")[2].split()[1]))
    return found


def refuse(line: str) -> NoReturn:
    """End with one line."""
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def kept_file(folder: Path | None, port: int) -> Path:
    """Where the last weights are kept; only this user can read the folder."""
    place = port or f"process-{os.getpid()}"
    folder = folder or Path(tempfile.gettempdir()) / f"grpo-vllm-{os.getuid()}-{place}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or folder.is_symlink():
        refuse(f"keep: {folder} belongs to somebody else. Name another folder with --keep.")
    folder.chmod(0o700)
    return folder / "weights"


async def serve(args: Any, token: str) -> None:
    """Load the model and answer until a signal."""
    args.worker_extension_cls = f"{INSIDE}.WeightReceiver"
    args.logits_processors = [f"{INSIDE}:KeyedDraw"]
    args.logprobs_mode, args.max_logprobs = "processed_logits", -1
    args.async_scheduling = False  # a draw needs the number of tokens before it
    args.stream_interval = max(args.stream_interval, STREAM_INTERVAL)
    if args.gpus:
        args.data_parallel_size = args.gpus
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(args))
    server = Server(engine, kept_file(args.keep, args.port))
    await server.restore()
    config = uvicorn.Config(Guard(app_of(server), token), args.host, args.port, log_level="warning", access_log=False)
    listening = uvicorn.Server(config)
    socket = config.bind_socket()
    port = socket.getsockname()[1]
    if args.port_file:
        partial = args.port_file.with_suffix(".partial")
        partial.write_text(str(port), encoding="utf-8")
        partial.replace(args.port_file)
    print(f"rollout server: {args.model} at http://{args.host}:{port}", flush=True)

    async def watch() -> None:
        """End the server when vLLM's engine has died, so that whoever started it can start it again."""
        while not engine.errored:
            await asyncio.sleep(1.0)
        listening.should_exit = listening.force_exit = True

    watching = asyncio.create_task(watch())
    try:
        await listening.serve([socket])
    finally:
        watching.cancel()
        died = engine.errored
        if not args.keep and not args.port:
            shutil.rmtree(server.kept.parent, ignore_errors=True)  # nobody will start at this place again
    if died:
        sys.exit("error: rollout server: vLLM's engine has died; the reason stands above.")


def main(argv: list[str]) -> None:
    """Run the server."""
    args = parse(argv)
    if args.die_with is not None and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if args.die_with not in ancestors():
            sys.exit(f"error: rollout server: process {args.die_with}, which started it, has ended.")
    token = os.environ.get(TOKEN_VARIABLE, "")
    if len(token) < 16:  # before a model is loaded
        refuse(f"{TOKEN_VARIABLE}: the environment must hold a secret of 16 characters or more, got {len(token)}.")
    lead_a_group()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(args, token))


if __name__ == "__main__":
    main(sys.argv[1:])
