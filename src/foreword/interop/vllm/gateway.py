"""The front beside `vllm serve`: an OpenAI-compatible server in which a prefix is a model name.

    python -m foreword.interop.vllm.gateway PREFIXES --model BASE --upstream http://127.0.0.1:8000

It turns a model name into placeholders, transfer parameters and a cache salt, and hands the answer back without them.
vLLM's own port must be reachable by the front alone: whoever reaches it can set these fields.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from ...errors import InputError
from ...serve.failure import Failure
from ...serve.guard import Guard
from .prefixes import Found, PrefixFolder
from .requests import Wanted, prompt_ids, rewrite, without_placeholders

TIMEOUT = httpx.Timeout(600, connect=5)
CHAT_ONLY = {"messages", "max_completion_tokens"}


class Front:
    """What turns requests for names into requests for the engine, and answers back.

    encode: a text's token ids, without special tokens; template: the ids of a chat; placeholder: a token that texts
    hardly hold, as penalties count it; base: the name under which the engine serves its model.
    """

    def __init__(
        self,
        folder: PrefixFolder,
        base: str,
        encode: Callable[[str], list[int]],
        template: Callable[[list[dict[str, Any]]], list[int]],
        placeholder: int,
        client: httpx.AsyncClient,
    ) -> None:
        self._folder, self._base, self._placeholder, self._client = folder, base, placeholder, client
        self._encode, self._template = encode, template

    def models(self) -> dict[str, Any]:
        names = [self._base, *self._folder.names()[0]]
        return {"object": "list", "data": [{"id": n, "object": "model", "owned_by": "foreword"} for n in names]}

    async def complete(self, body: dict[str, Any], chat: bool) -> Response:
        """Answer `/v1/completions`, or `/v1/chat/completions` by way of it."""
        name = body.get("model")
        try:
            found = None if name == self._base else self._folder.find(str(name))
        except InputError as error:
            return failure(404, str(error), "model_not_found")
        try:
            request = rewrite(
                self._as_completion(body) if chat else body, *self._wanted(found), self._encode, self._base
            )
            prompts = len(prompt_ids(request.get("prompt"), self._encode))
        except InputError as error:
            return failure(400, str(error))
        length = found.length if found else 0

        def answer(content: dict[str, Any]) -> dict[str, Any]:
            content = without_placeholders(content, length, prompts, str(name))
            return as_chat(content, bool(request.get("stream"))) if chat else content

        try:
            if request.get("stream"):
                return await self._stream(request, answer)
            response = await self._client.post("/v1/completions", json=request)
        except httpx.HTTPError as error:
            return failure(502, f"the engine cannot be reached ({type(error).__name__}).", "engine_unreachable")
        content = response.json()
        return JSONResponse(answer(content) if response.is_success else content, response.status_code)

    def _wanted(self, found: Found | None) -> tuple[Wanted | None, int]:
        if found is None:
            return None, 0
        return Wanted(found.name, found.digest, self._placeholder), found.length

    def _as_completion(self, body: dict[str, Any]) -> dict[str, Any]:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise InputError("messages must be a list of at least one message.")
        for name in ("tools", "logprobs"):
            if body.get(name):
                raise InputError(f"{name} cannot be asked for in a chat.")
        kept = {k: v for k, v in body.items() if k not in CHAT_ONLY}
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or 256
        return {**kept, "prompt": self._template(messages), "max_tokens": limit}

    async def _stream(self, request: dict[str, Any], answer: Callable[[dict[str, Any]], dict[str, Any]]) -> Response:
        outgoing = self._client.build_request("POST", "/v1/completions", json=request)
        response = await self._client.send(outgoing, stream=True)
        if not response.is_success:
            content = json.loads(await response.aread())
            return JSONResponse(content, response.status_code)

        async def parts() -> AsyncIterator[str]:
            try:
                async for line in response.aiter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        content = json.loads(line.removeprefix("data: "))
                        content = content if "error" in content else answer(content)
                        line = f"data: {json.dumps(content, ensure_ascii=False)}"
                    if line:
                        yield f"{line}\n\n"
            finally:
                await response.aclose()

        return StreamingResponse(parts(), media_type="text/event-stream")


def as_chat(content: dict[str, Any], streamed: bool) -> dict[str, Any]:
    """A completion, or a streamed part of one, in the words of chat completions."""
    part = "delta" if streamed else "message"
    choices = [
        {
            "index": choice["index"],
            part: {"role": "assistant", "content": choice["text"]},
            "finish_reason": choice.get("finish_reason"),
        }
        for choice in content.get("choices", [])
    ]
    kind = "chat.completion.chunk" if streamed else "chat.completion"
    return {**content, "id": content["id"].replace("cmpl-", "chatcmpl-", 1), "object": kind, "choices": choices}


def failure(status: int, message: str, code: str | None = None) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    return JSONResponse(Failure(status, message, code).body(), status)


def make_app(front: Front, keys: Sequence[str] = ()) -> FastAPI:
    """The routes. keys: API keys, any of which opens them; none leaves them open."""
    app = FastAPI(title="foreword on vLLM", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, keys=keys, opened=("/healthz",))

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return front.models()

    async def answered(request: Request, chat: bool) -> Response:
        try:
            body = json.loads(await request.body())
        except (json.JSONDecodeError, UnicodeDecodeError):
            body = None
        if not isinstance(body, dict):
            return failure(400, "the body must be a JSON object.")
        return await front.complete(body, chat)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answered(request, chat=False)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answered(request, chat=True)

    return app


def main(
    prefixes: Annotated[Path, typer.Argument(help="Folder of exported prefixes.")],
    model: Annotated[str, typer.Option(help="The base that vLLM serves: a folder or hub id, for its tokenizer.")],
    upstream: Annotated[str, typer.Option(help="Where vLLM listens.")] = "http://127.0.0.1:8000",
    served_name: Annotated[str | None, typer.Option(help="vLLM's --served-model-name; by default the model.")] = None,
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option()] = 8080,
    api_key: Annotated[
        list[str] | None, typer.Option(envvar="FOREWORD_API_KEY", help="Any of them opens the front.")
    ] = None,
) -> None:
    """Serve the base and every prefix of a folder as OpenAI models, on a running vLLM.

    Example: python -m foreword.interop.vllm.gateway served --model meta-llama/Llama-3.2-1B
    """
    import uvicorn
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    front = Front(
        PrefixFolder(prefixes),
        served_name or model,
        lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        lambda messages: tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False),
        tokenizer.vocab_size - 1,
        httpx.AsyncClient(base_url=upstream, timeout=TIMEOUT),
    )
    uvicorn.run(make_app(front, api_key or ()), host=host, port=port)


if __name__ == "__main__":
    typer.run(main)
