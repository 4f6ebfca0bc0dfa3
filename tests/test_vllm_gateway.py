"""The front beside vLLM, against an engine of a few lines that says what it was sent."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the front needs FastAPI (pip install fastapi)")
httpx = pytest.importorskip("httpx", reason="the front needs httpx (pip install httpx)")

from test_vllm import P, served  # noqa: E402, F401

from foreword.interop.vllm import gateway, requests  # noqa: E402
from foreword.interop.vllm.prefixes import PrefixFolder  # noqa: E402


class Engine:
    """Answers completions as vLLM does; keeps the last body."""

    def __init__(self) -> None:
        self.body: dict[str, Any] = {}
        self.status = 200

    def __call__(self, request: Any) -> Any:
        self.body = json.loads(request.content)
        prompts = self.body["prompt"] if isinstance(self.body["prompt"], list) else [[1, 2]]
        count = sum(len(prompt) for prompt in prompts)
        usage = {"prompt_tokens": count, "completion_tokens": 1, "total_tokens": count + 1}
        choice = {"index": 0, "text": "goal", "finish_reason": "stop"}
        content = {"id": "cmpl-1", "object": "text_completion", "model": self.body["model"], "choices": [choice]}
        if self.status != 200:
            return httpx.Response(self.status, json={"error": {"message": "no"}})
        if self.body.get("stream"):
            lines = [json.dumps(content), json.dumps({**content, "choices": [], "usage": usage}), "[DONE]"]
            return httpx.Response(200, text="".join(f"data: {line}\n\n" for line in lines))
        return httpx.Response(200, json={**content, "usage": usage})


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def call(served: Path, engine: Engine) -> Any:  # noqa: F811
    client = httpx.AsyncClient(base_url="http://engine", transport=httpx.MockTransport(engine))
    front = gateway.Front(
        PrefixFolder(served), "base", lambda text: [ord(c) for c in text], lambda messages: [7, 8], 9, client
    )
    app = gateway.make_app(front)

    def send(path: str, body: Any = None) -> Any:
        async def go() -> Any:
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(base_url="http://front", transport=transport) as client:
                if body is None:
                    return await client.get(path)
                return await client.post(path, content=body if isinstance(body, bytes) else json.dumps(body))

        return asyncio.run(go())

    return send


def test_base_and_prefixes_are_models(call: Any) -> None:
    assert [m["id"] for m in call("/v1/models").json()["data"]] == ["base", "mail", "news"]


def test_a_completion_goes_with_placeholders_and_comes_without(call: Any, engine: Engine, served: Path) -> None:  # noqa: F811
    answer = call("/v1/completions", {"model": "news", "prompt": "ab", "temperature": 0, "cache_salt": "mine"}).json()
    digest = PrefixFolder(served).find("news").digest
    assert engine.body["prompt"] == [[9] * P + [97, 98]] and engine.body["temperature"] == 0
    assert engine.body["cache_salt"] == requests.salt("news", digest)
    assert answer["model"] == "news" and answer["choices"][0]["text"] == "goal"
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}


def test_the_base_goes_as_it_is(call: Any, engine: Engine) -> None:
    params = {"foreword": {"prefix": "news"}}
    call("/v1/completions", {"model": "base", "prompt": "ab", "kv_transfer_params": params, "cache_salt": "mine"})
    assert engine.body == {"model": "base", "prompt": "ab"}


def test_streams_are_corrected_part_by_part(call: Any) -> None:
    body = {"model": "news", "prompt": "ab", "stream": True, "stream_options": {"include_usage": True}}
    lines = [line for line in call("/v1/completions", body).text.split("\n\n") if line]
    first, last = (json.loads(line.removeprefix("data: ")) for line in lines[:2])
    assert lines[2] == "data: [DONE]" and first["model"] == "news"
    assert last["usage"]["prompt_tokens"] == 2


def test_a_chat_is_a_completion_of_its_template(call: Any, engine: Engine) -> None:
    messages = [{"role": "user", "content": "hello"}]
    answer = call("/v1/chat/completions", {"model": "news", "messages": messages, "max_completion_tokens": 5}).json()
    assert engine.body["prompt"] == [[9] * P + [7, 8]] and engine.body["max_tokens"] == 5
    assert answer["object"] == "chat.completion" and answer["id"] == "chatcmpl-1"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "goal"}
    streamed = call("/v1/chat/completions", {"model": "news", "messages": messages, "stream": True}).text
    assert json.loads(streamed.split("\n\n")[0].removeprefix("data: "))["choices"][0]["delta"]["content"] == "goal"


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("completions", {"model": "unknown", "prompt": "a"}, 404, "there is no prefix 'unknown'"),
        ("completions", {"model": "../news", "prompt": "a"}, 404, "there is no prefix"),
        ("completions", {"prompt": "a"}, 404, "there is no prefix"),
        ("completions", {"model": "news", "prompt": ""}, 400, "the prompt is empty"),
        ("completions", {"model": "news"}, 400, "the prompt must be"),
        ("completions", {"model": "news", "prompt": "a", "prompt_logprobs": 1}, 400, "prompt_logprobs cannot be"),
        ("completions", {"model": "news", "prompt": "a", "magic": 1}, 400, "the field magic is unknown"),
        ("completions", b"{", 400, "must be a JSON object"),
        ("completions", b"[1]", 400, "must be a JSON object"),
        ("chat/completions", {"model": "news", "messages": []}, 400, "at least one message"),
        ("chat/completions", {"model": "news", "messages": [{}], "tools": [{}]}, 400, "tools cannot be asked for"),
    ],
)
def test_bad_requests_are_one_sentence(call: Any, path: str, body: Any, status: int, message: str) -> None:
    response = call(f"/v1/{path}", body)
    assert response.status_code == status and message in response.json()["error"]["message"]


def test_trouble_of_the_engine_is_passed_on(call: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.status = 503
    for stream in (False, True):
        assert call("/v1/completions", {"model": "news", "prompt": "a", "stream": stream}).status_code == 503

    def unreachable(request: Any) -> Any:
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(Engine, "__call__", lambda self, request: unreachable(request))
    for stream in (False, True):
        response = call("/v1/completions", {"model": "news", "prompt": "a", "stream": stream})
        assert response.status_code == 502 and "cannot be reached (ConnectError)" in response.json()["error"]["message"]


def test_keys_and_the_size_of_bodies_are_checked_before_the_engine_is_asked(served: Path, engine: Engine) -> None:  # noqa: F811
    client = httpx.AsyncClient(base_url="http://engine", transport=httpx.MockTransport(engine))
    front = gateway.Front(PrefixFolder(served), "base", lambda text: [1], lambda messages: [1], 9, client)
    app = gateway.make_app(front, ("first", "second"))

    async def status(path: str, content: bytes | None = None, **headers: str) -> int:
        async with httpx.AsyncClient(base_url="http://front", transport=httpx.ASGITransport(app=app)) as client:
            method = "GET" if content is None else "POST"
            return (await client.request(method, path, content=content, headers=headers)).status_code

    body = json.dumps({"model": "news", "prompt": "ab"}).encode()
    assert asyncio.run(status("/healthz")) == 200
    assert asyncio.run(status("/v1/models")) == 401
    assert asyncio.run(status("/v1/completions", body, authorization="Bearer third")) == 401 and engine.body == {}
    assert asyncio.run(status("/v1/completions", body, authorization="Bearer second")) == 200
    large = b" " * (1 << 20) + body
    assert asyncio.run(status("/v1/completions", large, authorization="Bearer first")) == 413
