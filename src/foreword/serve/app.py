"""The routes. Each checks nothing and computes nothing itself: `schema` and `service` do."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import FastAPI, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from .. import __version__
from .failure import Failure, broken, unknown_model
from .guard import Guard
from .library import Listed
from .playground import FILES, add_playground
from .schema import (
    NAME,
    AttentionAnswer,
    AttentionRequest,
    ChatRequest,
    ClassifyAnswer,
    ClassifyRequest,
    CompletionRequest,
    Done,
    ErrorBody,
    Health,
    Label,
    ModelCard,
    ModelList,
    PrefixList,
    PrefixState,
    TokenShare,
)
from .service import Service

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 404, 405, 408, 409, 413, 429, 500, 503, 504)
}
# These tell nothing of what is served.
OPEN = ("/", "/healthz", "/docs", "/openapi.json", "/static-offline-docs/", f"{FILES}/")
Name = Annotated[str, Path(pattern=NAME)]


def create_app(service: Service, keys: Sequence[str]) -> FastAPI:
    """The server as an ASGI application. keys: API keys, any of which opens it; none leaves it open."""

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        service.scheduler.start()
        yield
        service.scheduler.stop()
        service.prompts.close()

    app = FastAPIOffline(title="foreword", version=__version__, lifespan=running, responses=ERRORS, redoc_url=None)
    answers = service.metrics.requests
    app.add_middleware(Guard, keys=keys, opened=OPEN, count=lambda status: answers.labels(str(status)).inc())
    _add_errors(app)
    _add_answers(app, service)
    _add_models(app, service)
    _add_state(app, service)
    add_playground(app)
    return app


def _add_answers(app: FastAPI, service: Service) -> None:
    async def answer(asked: CompletionRequest | ChatRequest, request: Request) -> Response:
        if asked.stream:
            return StreamingResponse(await service.stream(asked, request), media_type="text/event-stream")
        return _json(await service.complete(asked, request))

    @app.post("/v1/completions")
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        """Continue one prompt or several; `model` is a prefix or the base."""
        return await answer(asked, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(asked: ChatRequest, request: Request) -> Response:
        """Answer a chat in the base's own template; `model` is a prefix or the base."""
        return await answer(asked, request)

    @app.post("/v1/classify")
    async def classify(asked: ClassifyRequest, request: Request) -> ClassifyAnswer:
        """The label of each text and the probability of every label; `model` is a classification prefix, or the base
        `like` one."""
        results = await service.classify(asked, request)
        data = [
            Label(index=i, label=r["label"], probability=r["score"], probabilities=r["scores"], cut=r["cut"])
            for i, r in enumerate(results)
        ]
        name = f"classify-{secrets.token_hex(12)}"
        return ClassifyAnswer(id=name, created=int(time.time()), model=asked.model, data=data)

    @app.post("/v1/attention")
    async def attention(asked: AttentionRequest, request: Request) -> AttentionAnswer:
        """The share of attention that each token of a text gives to the prefix: the mean over all heads of the layers
        that it enters. `model` is a prefix."""
        found = await service.attention(asked, request)
        pairs = zip(found.tokens, found.shares, strict=True)
        return AttentionAnswer(
            id=f"attention-{secrets.token_hex(12)}",
            created=int(time.time()),
            model=asked.model,
            share=sum(found.shares) / len(found.shares),
            tokens=[TokenShare(token=token, share=share) for token, share in pairs],
            cut=found.cut,
        )


def _add_models(app: FastAPI, service: Service) -> None:
    started = int(time.time())

    def cards() -> dict[str, ModelCard]:
        listed = service.library.listed.copy().values()
        return {service.base: card(service.base, started, None), **{p.name: card(p.name, p.created, p) for p in listed}}

    def card(name: str, created: int, listed: Listed | None) -> ModelCard:
        return ModelCard(
            id=name,
            created=created,
            parent=None if listed is None else service.base,
            routes=service.routes(listed),
            parameters=service.parameters,
            prefix=None if listed is None else listed.about,
        )

    @app.get("/v1/models")
    async def models() -> ModelList:
        """The base and every prefix."""
        return ModelList(data=list(cards().values()))

    @app.get("/v1/models/{name}")
    async def model(name: Name) -> ModelCard:
        """One of them."""
        if (card := cards().get(name)) is None:
            raise unknown_model(name)
        return card

    @app.get("/v1/prefixes")
    async def prefixes() -> PrefixList:
        """Every prefix: its length and labels, whether it is in memory, and those that are damaged."""
        library = service.library
        resident, damaged = set(library.resident()), library.damaged.copy()
        data = [
            PrefixState(name=p.name, length=p.about.length, labels=p.about.labels, resident=p.name in resident)
            for p in library.listed.copy().values()
        ]
        return PrefixList(data=data + [PrefixState(name=name, damaged=True) for name in damaged])

    @app.post("/v1/prefixes/{name}/load")
    @app.post("/v1/prefixes/{name}/reload")
    async def load(name: Name) -> Done:
        """Read a prefix from its folder, for the first time or anew; requests that run end with what they began."""
        await service.scheduler.call(lambda: service.library.reload(name))
        return Done(name=name, served=True)

    @app.post("/v1/prefixes/{name}/unload")
    async def unload(name: Name) -> Done:
        """Serve a prefix no longer; requests that run end as they began."""
        await service.scheduler.call(lambda: service.library.unload(name))
        return Done(name=name, served=False)


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", responses={503: {"model": Health}})
    async def healthz(response: Response) -> Health:
        """Whether requests are taken."""
        if service.scheduler.alive:
            return Health(status="ok")
        response.status_code = 503
        return Health(status="stopping")

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Failure)
    async def failed(request: Request, failure: Failure) -> Response:
        retry = {} if failure.retry_after is None else {"Retry-After": str(failure.retry_after)}
        return _json(failure.body(), failure.status, retry)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _json(Failure(400, _sentence(error.errors())).body(), 400)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        sentence = f"{request.method} of this path: {str(error.detail).lower()}; /docs lists the routes."
        return _json(Failure(error.status_code, sentence).body(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        return _json(broken().body(), 500)


def _sentence(errors: Sequence[Any]) -> str:
    """What is wrong with a request: of all that pydantic found (one for each type that a field may have), the first
    that says more than that the type is another one, else the first that lies deepest."""
    telling = [error for error in errors if not error["type"].endswith(("_type", "_parsing"))]
    first = max(telling or errors, key=lambda error: len(error["loc"]))
    place = ".".join(str(part) for part in first["loc"][1:] if "[" not in str(part))[:80]
    return f"{place or 'the body'}: {first['msg'].lower()}; /docs says what is taken."


def _json(body: dict[str, Any], status: int = 200, headers: Any = None) -> Response:
    """JSON in ASCII: what clients sent may hold halves of characters, which UTF-8 cannot."""
    return Response(json.dumps(body), status, dict(headers or {}), "application/json")
