"""Requests that nobody would write: never a 5xx, never an answer that is not what the schema says, never a hang.

Runs for FOREWORD_FUZZ_REQUESTS requests (5,000 by default): half made by schemathesis from the OpenAPI page, half raw
bytes and JSON of hypothesis's making. Afterwards the server answers as it did before.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from .conftest import CLASSIFIERS, NAMES, OTHERS, Offline, Server
from .test_server import complete

REQUESTS = int(os.environ.get("FOREWORD_FUZZ_REQUESTS", "5000"))
SETTINGS = {
    "deadline": None,
    "database": None,
    "phases": [Phase.generate],
    "suppress_health_check": list(HealthCheck),
}
CHECKS = [
    schemathesis.checks.not_a_server_error,
    schemathesis.checks.response_schema_conformance,
    schemathesis.checks.content_type_conformance,
    schemathesis.checks.status_code_conformance,
]
POSTS = ["completions", "chat/completions", "classify", "attention"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = "model prompt messages input like max_tokens temperature top_p seed stop stream logprobs n echo user".split()
BODIES = st.fixed_dictionaries(
    {"model": st.sampled_from([*NAMES, *CLASSIFIERS, *OTHERS, "tiny-llama"]) | JSON},
    optional={name: JSON for name in FIELDS if name != "model"}
    | {
        "prompt": st.text(max_size=30) | JSON,
        "input": st.text(max_size=30) | st.lists(st.text(max_size=10), max_size=3),
        "like": st.sampled_from([*CLASSIFIERS, "p0"]) | JSON,
        "messages": st.just([{"role": "user", "content": "x"}]) | JSON,
        "max_tokens": st.integers(1, 8),
        "stream": st.booleans(),
        "stop": st.text(max_size=3) | JSON,
    },
)
SOUND = st.fixed_dictionaries(
    {"model": st.sampled_from([*NAMES, "tiny-llama"]), "prompt": st.text(min_size=1, max_size=30)},
    optional={
        "max_tokens": st.integers(1, 8),
        "stream": st.booleans(),
        "stop": st.text(min_size=1, max_size=3),
        "temperature": st.floats(0, 2),
        "top_p": st.floats(0.01, 1),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "logprobs": st.integers(0, 20),
    },
)
SOUND_TEXTS = st.fixed_dictionaries({"model": st.sampled_from(CLASSIFIERS), "input": st.text(min_size=1, max_size=30)})


@pytest.mark.slow
def test_no_request_breaks_the_server(server: Server, offline: Offline) -> None:
    seen: Counter[int] = Counter()
    with httpx.Client(base_url=server.url, timeout=60) as client:
        send_by_schema(client, REQUESTS - REQUESTS // 2, seen)
        send_raw(client, REQUESTS // 2, seen)
        assert client.get("/healthz").json() == {"status": "ok"}
    print(f"\nfuzz: {sum(seen.values())} requests, by status {dict(sorted(seen.items()))}")
    assert sum(seen.values()) >= REQUESTS
    assert min(seen[200], seen[400]) > REQUESTS / 20
    for name in NAMES:
        httpx.post(f"{server.url}/v1/prefixes/{name}/load")  # the fuzz may have unloaded it
        assert complete(server, name, "the cat").choices[0].text == offline.text(name, "the cat", 12)


def send_by_schema(client: httpx.Client, count: int, seen: Counter[int]) -> None:
    """`count` requests at least, over every route, that keep to the OpenAPI page or break it."""
    document = client.get("/openapi.json").json()
    operations = list(schemathesis.openapi.from_dict(document).get_all_operations())
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    pairs = [(operation.ok(), mode) for operation, mode in itertools.product(operations, modes)]
    want, per_pair = seen.total() + count, -(-count // len(pairs))
    rounds = 0
    while seen.total() < want:  # a route without parameters has few requests to offer
        for operation, mode in pairs:
            strategy = operation.as_strategy(generation_mode=mode)

            @settings(max_examples=per_pair, **SETTINGS)  # type: ignore[arg-type]
            @given(strategy)
            def send(case: schemathesis.Case) -> None:
                response = case.call(base_url=str(client.base_url))
                seen[response.status_code] += 1
                assert response.status_code < 500, (response.status_code, case.body, response.text)
                case.validate_response(response, checks=CHECKS)

            try:
                send()
            except schemathesis.errors.SchemathesisError:
                pass
            except Exception as error:
                if "Unsatisfiable" not in type(error).__name__:
                    raise
        rounds += 1
        assert rounds < 10, "the schema offers too few requests"


def send_raw(client: httpx.Client, count: int, seen: Counter[int]) -> None:
    """`count` bodies: sound ones, bytes of any kind, JSON of any kind, and objects whose fields have likely names."""
    sound = st.tuples(st.just("completions"), SOUND.map(dumped))
    sound |= st.tuples(st.sampled_from(["classify", "attention"]), SOUND_TEXTS.map(dumped))
    unsound = BODIES.map(dumped) | JSON.map(dumped) | st.binary(max_size=200)

    @settings(max_examples=count, **SETTINGS)  # type: ignore[arg-type]
    @given(sound | st.tuples(st.sampled_from(POSTS), unsound))
    def send(request: tuple[str, bytes]) -> None:
        path, body = request
        response = client.post(f"/v1/{path}", content=body, headers={"content-type": "application/json"})
        seen[response.status_code] += 1
        assert response.status_code < 500, (path, body, response.text)
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    send()


def dumped(value: object) -> bytes:
    return json.dumps(value).encode()
