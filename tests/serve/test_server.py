"""The server as a process: every answer is the offline one, whatever runs beside it, and trouble is told."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import httpx
import openai
import pytest

from foreword.bases import load_base
from foreword.model import PrefixModel

from .conftest import CLASSIFIERS, NAMES, OTHERS, TEMPLATE, WORDS, Offline, Server, add_random

BASE = "tiny-llama"
MODELS = [*NAMES, BASE]


def prompt_of(random: Random) -> str:
    return " ".join(random.choice(WORDS) for _ in range(random.randint(1, 12)))


def complete(server: Server, model: str, prompt: str, count: int = 12, **settings: Any) -> Any:
    settings = {"temperature": 0, **settings}
    return server.client().completions.create(model=model, prompt=prompt, max_tokens=count, **settings)


def post(server: Server, path: str, body: Any, **settings: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=60, **settings)


# ---- answers


def test_models_are_the_base_and_every_sound_prefix(server: Server) -> None:
    client = server.client()
    names = [model.id for model in client.models.list()]
    assert names[0] == BASE and set(names[1:]) == {*NAMES, *CLASSIFIERS, *OTHERS}
    assert client.models.retrieve("p1").parent == BASE  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError, match="no model 'p99'"):
        client.models.retrieve("p99")


def test_the_prefixes_that_the_tests_use_answer_differently(offline: Offline) -> None:
    assert len({offline.text(model, "the cat", 12) for model in MODELS}) > 4


def test_every_answer_under_load_is_the_offline_one(server: Server, offline: Offline) -> None:
    random = Random(0)
    asked = [(random.choice(MODELS), prompt_of(random), random.randint(1, 30)) for _ in range(60)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda one: complete(server, *one), asked))
    for (model, prompt, count), answer in zip(asked, answers, strict=True):
        tokens = offline.tokens(model, prompt, count)
        assert answer.choices[0].text == offline.text(model, prompt, count)
        assert answer.usage.completion_tokens == len(tokens)
        ids = offline.tokenizer(prompt, add_special_tokens=model == BASE)["input_ids"]
        assert answer.usage.prompt_tokens == len(ids)
        assert answer.choices[0].finish_reason == ("length" if len(tokens) == count else "stop")
    assert server.metric("foreword_batch_rows_sum") / server.metric("foreword_batch_rows_count") > 1.5


def test_streams_add_up_to_the_whole_answer(server: Server, offline: Offline) -> None:
    def stream(model: str) -> tuple[str, list[Any]]:
        options = {"include_usage": True}
        chunks = list(complete(server, model, "the dog runs", 20, stream=True, stream_options=options))
        return "".join(chunk.choices[0].text for chunk in chunks if chunk.choices), chunks

    with ThreadPoolExecutor(4) as pool:
        for model, (text, chunks) in zip(MODELS, pool.map(stream, MODELS), strict=True):
            assert text == offline.text(model, "the dog runs", 20)
            assert chunks[-1].usage.completion_tokens == len(offline.tokens(model, "the dog runs", 20))
            assert chunks[-2].choices[0].finish_reason in ("length", "stop")


def test_chat_is_the_templates_text_completed(server: Server, offline: Offline) -> None:
    messages: Any = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "runs"}]
    text = "user: the cat\nassistant: runs\nassistant:"
    assert offline.tokenizer.chat_template == TEMPLATE
    chat = server.client().chat.completions
    whole = chat.create(model="p2", messages=messages, temperature=0, max_tokens=15)
    assert whole.choices[0].message.content == offline.text("p2", text, 15)
    chunks = chat.create(model="p2", messages=messages, temperature=0, max_tokens=15, stream=True)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content


def test_several_prompts_and_prompts_of_ids(server: Server, offline: Offline) -> None:
    prompts: Any = ["the cat", "a dog runs after", "red"]
    answer = complete(server, "p3", prompts)
    assert [c.text for c in answer.choices] == [offline.text("p3", p, 12) for p in prompts]
    ids: Any = [offline.tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]
    assert [c.text for c in complete(server, "p3", ids).choices] == [c.text for c in answer.choices]


def test_stop_strings_end_the_text_before_them(server: Server, offline: Offline) -> None:
    whole = offline.text("p1", "the cat", 30)
    stop = whole[7:10]
    cut = whole[: whole.index(stop)]
    answer = complete(server, "p1", "the cat", 30, stop=[stop, "never said"])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (cut, "stop")
    chunks = list(complete(server, "p1", "the cat", 30, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == cut
    assert answer.usage.completion_tokens < 30


def test_logprobs_are_the_models(server: Server, offline: Offline) -> None:
    import torch

    ids = offline.tokenizer("the cat", add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = offline.model(input_ids=ids, prefix="p4").logits[0, -1].log_softmax(-1)
    given = complete(server, "p4", "the cat", 3, logprobs=2).choices[0].logprobs
    assert given.token_logprobs[0] == pytest.approx(float(expected.max()), abs=1e-4)
    messages: Any = [{"role": "user", "content": "the cat"}]
    chat = server.client().chat.completions.create(
        model="p4", messages=messages, temperature=0, max_tokens=3, logprobs=True, top_logprobs=2
    )
    content = chat.choices[0].logprobs.content  # type: ignore[union-attr]
    assert len(content) == 3 and all(token.top_logprobs[0].logprob == token.logprob for token in content)
    ids = offline.tokenizer("user: the cat\nassistant:", add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = offline.model(input_ids=ids, prefix="p4").logits[0, -1].log_softmax(-1)
    assert [t.logprob for t in content[0].top_logprobs] == pytest.approx(expected.topk(2).values.tolist(), abs=1e-4)


def test_sampling_depends_on_the_seed_and_not_on_who_runs_beside(server: Server) -> None:
    def sample(seed: int) -> str:
        return complete(server, "p0", "the cat", 20, temperature=1.0, top_p=0.9, seed=seed).choices[0].text

    alone = [sample(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(sample, range(8))) == alone
    assert len(set(alone)) > 1
    assert complete(server, "p0", "the cat", 20, temperature=1e-9).choices[0].text == (
        complete(server, "p0", "the cat", 20).choices[0].text
    )


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classify_is_what_predict_says(server: Server, offline: Offline, name: str) -> None:
    random = Random(1)
    texts = [prompt_of(random) for _ in range(70)]
    expected = offline.classifiers[name].predict(texts, prefix=name)
    with ThreadPoolExecutor(4) as pool:
        beside = [pool.submit(complete, server, "p1", "the cat", 20) for _ in range(3)]
        answers = pool.submit(post, server, "/v1/classify", {"model": name, "input": texts}).result().json()["data"]
        assert all(one.result().choices[0].text == offline.text("p1", "the cat", 20) for one in beside)
    assert [answer["label"] for answer in answers] == [one["label"] for one in expected]
    for answer, one in zip(answers, expected, strict=True):
        assert answer["probabilities"] == pytest.approx(one["scores"], abs=1e-4)
    assert len({round(answer["probability"], 3) for answer in answers}) > 5  # the texts are told apart


# ---- trouble


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("completions", {"model": "p99", "prompt": "a"}, 404, "no model 'p99'"),
        ("completions", {"model": "../p0", "prompt": "a"}, 400, "model"),
        ("completions", {"model": "damaged", "prompt": "a"}, 404, "no model 'damaged'"),
        ("completions", {"model": "p0", "prompt": ""}, 400, "empty"),
        ("completions", {"model": "p0", "prompt": []}, 400, "prompt"),
        ("completions", {"model": "p0", "prompt": [400]}, 400, "token 400 is not in the vocabulary of 400"),
        ("completions", {"model": "p0", "prompt": "a", "n": 2}, 400, "n:"),
        ("completions", {"model": "p0", "prompt": "a", "echo": True}, 400, "echo"),
        ("completions", {"model": "p0", "prompt": "a", "logit_bias": {}}, 400, "logit_bias"),
        ("completions", {"model": "p0", "prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        ("completions", {"model": "p0", "prompt": "a", "temperature": "NaN"}, 400, "temperature"),
        ("completions", {"model": "p0", "prompt": "a", "max_tokens": 125}, 400, "room for 125"),
        ("completions", {"model": "p0", "prompt": "a", "\ud800": 1}, 400, "unicode"),
        ("completions", {"model": "p0", "prompt": ["a"] * 17}, 400, "16"),
        ("completions", [], 400, "the body"),
        ("chat/completions", {"model": "p0", "messages": []}, 400, "messages"),
        ("chat/completions", {"model": "p0", "messages": [{"role": "x", "content": "a"}]}, 400, "role"),
        ("classify", {"model": "sorts", "input": ["a", " "]}, 400, "text 2 is empty"),
        ("classify", {"model": "p0", "input": "x"}, 400, "not trained to classify"),
        ("classify", {"model": BASE, "input": "x"}, 400, "not trained to classify"),
        ("classify", {"model": "pairs", "input": "x"}, 400, "several texts"),
        ("classify", {"model": "many", "input": "x"}, 400, "several labels"),
        ("classify", {"model": BASE, "like": "p0", "input": "x"}, 400, "'p0' was not trained to classify"),
        ("classify", {"model": BASE, "like": BASE, "input": "x"}, 400, "not trained to classify"),
        ("classify", {"model": BASE, "like": "p99", "input": "x"}, 404, "no model 'p99'"),
        ("classify", {"model": BASE, "like": "tells", "input": "x"}, 400, "a layer that was trained with it"),
        ("classify", {"model": "sorts", "like": "sorts", "input": "x"}, 400, "like: 'sorts' is no base"),
        ("attention", {"model": BASE, "input": "x"}, 400, "is the base; name a prefix"),
        ("attention", {"model": "p99", "input": "x"}, 404, "no model 'p99'"),
        ("attention", {"model": "p0", "input": ""}, 400, "empty"),
        ("attention", {"model": "sorts", "input": " "}, 400, "text 1 is empty"),
        ("attention", {"model": "p0", "input": ["x"]}, 400, "input"),
        ("attention", {"model": "p0", "input": []}, 400, "input"),
        ("attention", {"model": "p0", "input": "cat " * 200}, 400, "there is room for 125"),
        ("attention", {"model": "p0"}, 400, "input"),
        ("nothing", {}, 404, "not found"),
        ("prefixes/p99/load", {}, 404, "no model 'p99'"),
        ("prefixes/..%2Fp0/load", {}, 404, "not found"),
        ("prefixes/damaged/reload", {}, 409, "damaged"),
    ],
)
def test_bad_requests_get_one_sentence(server: Server, path: str, body: Any, status: int, said: str) -> None:
    answer = httpx.post(
        f"{server.url}/v1/{path}", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    error = answer.json()["error"]
    assert answer.status_code == status and said in error["message"].lower()
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"] and "/tmp" not in error["message"]


def test_bodies_that_are_no_json_or_too_large(server: Server) -> None:
    headers = {"content-type": "application/json"}
    for content in (b"{", b"\xff", b"[" * 100_000, b"1" * 5000, b""):
        assert httpx.post(f"{server.url}/v1/completions", content=content, headers=headers).status_code == 400
    big = httpx.post(f"{server.url}/v1/completions", content=b" " * ((1 << 20) + 1), headers=headers)
    assert big.status_code == 413 and "larger" in big.json()["error"]["message"]
    chunks = httpx.post(f"{server.url}/v1/completions", content=iter([b" " * (1 << 19)] * 3), headers=headers)
    assert chunks.status_code == 413


def test_damaged_prefixes_are_told(server: Server) -> None:
    states = {state["name"]: state for state in httpx.get(f"{server.url}/v1/prefixes").json()["data"]}
    assert states["damaged"]["damaged"] and not states["p0"]["damaged"]
    assert states["sorts"]["labels"] == ["animal", "tool"] and states["p1"]["length"] == 5
    assert "Not served: " in server.log.read_text() and "not valid JSON" in server.log.read_text()
    assert states["moving"]["damaged"] and "is dynamic, which is not served" in server.log.read_text()
    assert states["adapted"]["damaged"] and "comes with adapters on the base" in server.log.read_text()


def test_clients_that_go_away_free_their_rows(serve: Callable[..., Server], prefixes: Path) -> None:
    server = serve(prefixes, "--rows", 2)
    body = {"model": "p0", "prompt": "the cat", "max_tokens": 100, "temperature": 0}
    for stream in (False, True, False, True):
        with pytest.raises(httpx.ReadTimeout):
            post_slow(server, {**body, "stream": stream})
    until(lambda: server.metric("foreword_cancelled_total") == 4)
    until(lambda: server.metric("foreword_running") == 0)
    assert complete(server, "p1", "the cat").choices[0].text


def post_slow(server: Server, body: dict[str, Any]) -> None:
    """Send a request while others hold the model, and give up at once."""
    jobs = {"model": "p1", "prompt": ["the cat"] * 8, "max_tokens": 100, "temperature": 0}
    holding = threading.Thread(target=post, args=(server, "/v1/completions", jobs))
    holding.start()
    until(lambda: server.metric("foreword_running") == 2)
    try:
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=httpx.Timeout(10, read=0.05))
    finally:
        holding.join()


def until(true: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def test_overload_is_refused_at_once(serve: Callable[..., Server], prefixes: Path, offline: Offline) -> None:
    server = serve(prefixes, "--rows", 1, "--waiting", 3)
    body = {"model": "p0", "prompt": "the cat", "max_tokens": 100, "temperature": 0}
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: post(server, "/v1/completions", body), range(16)))
    refused = [answer for answer in answers if answer.status_code == 429]
    served = [answer for answer in answers if answer.status_code == 200]
    assert refused and len(refused) + len(served) == 16 and len(served) >= 3
    assert all(answer.headers["retry-after"] == "1" for answer in refused)
    assert {answer.json()["choices"][0]["text"] for answer in served} == {offline.text("p0", "the cat", 100)}


def test_requests_that_take_too_long_fail(serve: Callable[..., Server], prefixes: Path) -> None:
    server = serve(prefixes, "--rows", 1, "--deadline", 0.1)
    body = {"model": "p0", "prompt": ["the cat"] * 16, "max_tokens": 100, "temperature": 0}
    answer = post(server, "/v1/completions", body)
    assert answer.status_code == 504 and "took longer" in answer.json()["error"]["message"]
    events = post(server, "/v1/completions", {**body, "stream": True}).text
    assert "took longer" in events and "[DONE]" not in events
    assert post(server, "/v1/completions", {**body, "prompt": "a", "max_tokens": 1}).status_code == 200


def test_api_keys_open_every_route_but_health(serve: Callable[..., Server], prefixes: Path) -> None:
    server = serve(prefixes, "--api-key", "first", environment={"FOREWORD_API_KEY": "unused"})
    assert httpx.get(f"{server.url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{server.url}/openapi.json").status_code == 200
    page = httpx.get(f"{server.url}/docs").text
    files = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(files) == 3 and "://" not in page.replace(server.url, "")
    assert all(httpx.get(f"{server.url}{file}").status_code == 200 for file in files)
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "first"}):
        for path in ("/v1/models", "/metrics", "/v1/prefixes", "/static", "/static/../v1/models", "//v1/models"):
            answer = httpx.get(f"{server.url}{path}", headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["type"] == "authentication_error"
    assert len(list(server.client("first").models.list())) == 1 + len([*NAMES, *CLASSIFIERS, *OTHERS])
    with pytest.raises(openai.AuthenticationError):
        server.client("second").models.list()


# ---- prefixes that come and go


def test_load_reload_and_unload_while_requests_run(
    serve: Callable[..., Server], chat_llama: Path, prefixes: Path, offline: Offline, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(prefixes / "p0", folder / "job")
    server = serve(folder)
    model = PrefixModel(*load_base(str(chat_llama)))
    add_random(model, "new", 99, length=6)
    ids = offline.tokenizer("the cat", add_special_tokens=False, return_tensors="pt")
    made = model.generate(**{k: ids[k] for k in ("input_ids", "attention_mask")}, prefix="new", max_new_tokens=60)
    new = offline.tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    old = offline.text("p0", "the cat", 60)
    assert old != new

    stop, texts = threading.Event(), []

    def ask() -> None:
        while not stop.is_set():
            texts.append(complete(server, "job", "the cat", 60).choices[0].text)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: len(texts) >= 4)
    shutil.rmtree(folder / "job")
    model.save_pretrained(folder / "job", "new")
    assert post(server, "/v1/prefixes/job/reload", None).json() == {"name": "job", "served": True}
    until(lambda: new in texts)
    stop.set()
    for thread in threads:
        thread.join()
    assert set(texts) == {old, new}
    assert complete(server, "job", "the cat", 60).choices[0].text == new

    (folder / "job" / "prefix.safetensors").write_bytes(b"damage")
    assert post(server, "/v1/prefixes/job/reload", None).status_code == 409
    assert complete(server, "job", "the cat", 60).choices[0].text == new
    shutil.copytree(prefixes / "p1", folder / "late")
    assert post(server, "/v1/prefixes/late/load", None).status_code == 200
    assert complete(server, "late", "the cat").choices[0].text == offline.text("p1", "the cat", 12)
    assert post(server, "/v1/prefixes/late/unload", None).json()["served"] is False
    with pytest.raises(openai.NotFoundError):
        complete(server, "late", "the cat")
    assert post(server, "/v1/prefixes/late/unload", None).status_code == 404


def test_a_prefix_whose_tensors_are_damaged_fails_alone(
    serve: Callable[..., Server], prefixes: Path, offline: Offline, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    for name in ("p0", "p1"):
        shutil.copytree(prefixes / name, folder / name)
    (folder / "p0" / "prefix.safetensors").write_bytes(b"damage")
    server = serve(folder)
    with pytest.raises(openai.NotFoundError, match="damaged"):
        complete(server, "p0", "the cat")
    assert complete(server, "p1", "the cat").choices[0].text == offline.text("p1", "the cat", 12)
    assert "p0" not in [model.id for model in server.client().models.list()]
    shutil.rmtree(folder / "p0")
    shutil.copytree(prefixes / "p0", folder / "p0")
    assert post(server, "/v1/prefixes/p0/load", None).status_code == 200
    assert complete(server, "p0", "the cat").choices[0].text == offline.text("p0", "the cat", 12)


def test_sigterm_lets_requests_end(serve: Callable[..., Server], prefixes: Path, offline: Offline) -> None:
    server = serve(prefixes, "--rows", 2)
    body = {"model": "p0", "prompt": ["the cat"] * 8, "max_tokens": 60, "temperature": 0}
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(post, server, "/v1/completions", body)
        stream = pool.submit(post, server, "/v1/completions", {**body, "stream": True})
        until(lambda: server.metric("foreword_running") == 2)
        assert server.end() == 0
    assert {c["text"] for c in waiting.result().json()["choices"]} == {offline.text("p0", "the cat", 60)}
    assert stream.result().text.endswith("data: [DONE]\n\n")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/healthz")
