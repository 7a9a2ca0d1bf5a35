"""The routes of a rollout server (server.py), and the token that guards them."""

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from grpo.rollout.vllm.wire import TOKEN_VARIABLE, BadStream, describe

if TYPE_CHECKING:
    from grpo.rollout.vllm.server import Server

SILENT_S = 300.0  # most seconds between two pieces of weights; ranks may be gathering them


class Guard:
    """ASGI middleware: no token, no answer."""

    def __init__(self, app: Any, token: str):
        self.app, self.expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass requests that carry the token on."""
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        if scope["type"] == "lifespan" or hmac.compare_digest(given, self.expected):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await JSONResponse({"error": f"the token is missing or wrong ({TOKEN_VARIABLE})"}, 401)(
                scope, receive, send
            )


def app_of(server: "Server") -> FastAPI:
    """The routes."""
    app = FastAPI(openapi_url=None)

    @app.get("/health")
    async def health() -> JSONResponse:
        try:
            await server.engine.check_health()
        except Exception as error:
            return JSONResponse({"error": f"vLLM's engine has died: {describe(error)}"}, 500)
        return JSONResponse(server.facts())

    @app.post("/generate")
    async def generate(request: Request) -> Any:
        given = json.loads(await request.body())
        if server.loading.locked() or given["version"] != server.version:
            held = (
                "weights that are being loaded" if server.loading.locked() else f"weights {server.version or 'of none'}"
            )
            return JSONResponse({"error": f"it holds {held}, asked for {given['version']}"}, 409)
        await server.wake()
        lines: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        task = asyncio.create_task(server.sample(given, lines))
        server.running.add(task)
        task.add_done_callback(server.running.discard)

        async def stream() -> AsyncIterator[bytes]:
            try:
                while (line := await lines.get()) is not None:
                    yield json.dumps(line).encode() + b"\n"
            finally:
                task.cancel()  # the trainer has left

        return StreamingResponse(stream(), media_type="application/x-ndjson")

    _add_weights(app, server)

    @app.post("/sleep")
    async def sleep() -> JSONResponse:
        if server.running or server.loading.locked():
            return JSONResponse({"error": "it is at work"}, 409)
        await server.sleep()
        return JSONResponse({"asleep": True})

    return app


def _add_weights(app: FastAPI, server: "Server") -> None:
    """The routes that change the weights."""

    async def alone(what: str, work: Callable[[], Awaitable[dict[str, Any]]]) -> JSONResponse:
        """The answer of work that changes the weights, one at a time."""
        if server.loading.locked():
            return JSONResponse({"error": "other weights are being loaded"}, 409)
        async with server.loading:
            try:
                return JSONResponse(await work())
            except BadStream as error:
                return JSONResponse({"error": f"{what}: {error}"}, 400)
            except Exception as error:
                return JSONResponse({"error": f"{what}: {describe(error)}"}, 500)

    @app.post("/weights")
    async def weights(request: Request) -> JSONResponse:
        async def work() -> dict[str, Any]:
            pieces = request.stream()
            with server.arriving.open("wb") as file:
                try:
                    while piece := await asyncio.wait_for(anext(pieces, b""), SILENT_S):
                        file.write(piece)
                except TimeoutError:
                    raise BadStream(f"nothing came for {SILENT_S:g} s") from None
            return await server.load_stored(request.query_params["version"])

        return await alone("weights", work)

    @app.post("/group")
    async def group(request: Request) -> JSONResponse:
        place = json.loads(await request.body())
        return await alone("process group", lambda: server.join(place))

    @app.post("/broadcast")
    async def broadcast(request: Request) -> JSONResponse:
        given = json.loads(await request.body())
        return await alone("weights", lambda: server.load_broadcast(given["group"], given["number"], given["version"]))
