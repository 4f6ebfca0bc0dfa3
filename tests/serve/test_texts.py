"""Texts that are read and not continued: the base classifying like a prefix, where attention goes, what clients need to
know of a prefix."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from foreword.shares import attention_shares, watching

from .conftest import Offline, Server
from .test_server import BASE, complete, post, prompt_of


def attention(server: Server, model: str, asked: Any) -> dict[str, Any]:
    answer = post(server, "/v1/attention", {"model": model, "input": asked})
    assert answer.status_code == 200, answer.text
    return answer.json()


def expected_shares(offline: Offline, call: Any) -> list[float]:
    """The mean over sites and heads of the mass on the prefix at each token, of what the sites themselves report."""
    found: list[Tensor] = []
    with torch.no_grad(), watching(lambda module, mass: found.append(mass.sum(-1))), offline.model.padded():
        call()
    assert len(found) == len(offline.model.sites)
    return torch.stack(found).mean((0, 1, 2)).tolist()


def test_the_base_classifies_like_a_prefix(server: Server, offline: Offline) -> None:
    random = Random(2)
    texts = [prompt_of(random) for _ in range(70)]
    body = {"model": BASE, "like": "sorts", "input": texts}
    with ThreadPoolExecutor(6) as pool:
        beside = [pool.submit(complete, server, "p1", "the cat", 20) for _ in range(3)]
        prefixed = pool.submit(post, server, "/v1/classify", {"model": "sorts", "input": texts})
        bare = pool.submit(post, server, "/v1/classify", body).result().json()
        assert all(one.result().choices[0].text == offline.text("p1", "the cat", 20) for one in beside)
    assert bare["model"] == BASE
    classifier = offline.classifiers["sorts"]
    for answers, prefix in ((bare, None), (prefixed.result().json(), "sorts")):
        expected = classifier.predict(texts, prefix=prefix)
        assert [one["label"] for one in answers["data"]] == [one["label"] for one in expected]
        for answer, one in zip(answers["data"], expected, strict=True):
            assert answer["probabilities"] == pytest.approx(one["scores"], abs=1e-4)
    changed = zip(bare["data"], prefixed.result().json()["data"], strict=True)
    assert max(abs(a["probability"] - b["probability"]) for a, b in changed) > 0.05  # the prefix is read


@pytest.mark.parametrize("name", ["sorts", "tells"])
def test_attention_of_a_classifier_s_text(server: Server, offline: Offline, name: str) -> None:
    text = "the cat sleeps — ünder a stone"
    classifier = offline.classifiers[name]
    (ids,), _ = classifier.encode([text])
    row = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    found = attention(server, name, text)
    assert [one["share"] for one in found["tokens"]] == pytest.approx(
        expected_shares(offline, lambda: classifier(**row, prefix=name)), abs=1e-5
    )
    tokens = [one["token"] for one in found["tokens"]]
    assert len(tokens) == len(ids) and "".join(tokens) == offline.tokenizer.decode(ids) and text in "".join(tokens)
    sites = attention_shares(offline.model, lambda batch: classifier(**batch, prefix=name), [row])
    mean = torch.stack([site.sum(-1).mean() for site in sites.values()]).mean()
    assert found["share"] == pytest.approx(float(mean), abs=1e-5)
    assert found["cut"] is False and 0 < min(one["share"] for one in found["tokens"]) < found["share"] < 1


def test_attention_of_prompts_and_chats_while_others_decode(server: Server, offline: Offline) -> None:
    chat = [{"role": "user", "content": "the cat"}]
    asked = {"the dog runs after": "the dog runs after", "user: the cat\nassistant:": chat}
    with ThreadPoolExecutor(8) as pool:
        beside = [pool.submit(complete, server, name, "the cat", 40) for name in ("p0", "p1", "p2", BASE)]
        answers = [pool.submit(attention, server, "p3", body) for body in asked.values()]
        for text, answer in zip(asked, answers, strict=True):
            ids = offline.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            expected = expected_shares(offline, lambda ids=ids: offline.model(input_ids=ids, prefix="p3"))
            found = answer.result()
            assert [one["share"] for one in found["tokens"]] == pytest.approx(expected, abs=1e-5)
            assert "".join(one["token"] for one in found["tokens"]) == text
        for name, one in zip(("p0", "p1", "p2", BASE), beside, strict=True):
            assert one.result().choices[0].text == offline.text(name, "the cat", 40)


def test_a_text_that_is_too_long_for_a_classifier_is_cut(server: Server) -> None:
    found = attention(server, "sorts", "the cat sleeps " * 40)
    assert found["cut"] is True and len(found["tokens"]) == 48
    assert "".join(one["token"] for one in found["tokens"][-3:]).endswith("Category:")


def test_models_say_what_a_client_needs(server: Server) -> None:
    cards = {card["id"]: card for card in httpx.get(f"{server.url}/v1/models").json()["data"]}
    writes = ["/v1/completions", "/v1/chat/completions"]
    assert cards[BASE]["routes"] == writes and cards[BASE]["prefix"] is None and cards[BASE]["parameters"] > 10_000
    assert cards["p1"]["routes"] == [*writes, "/v1/attention"] and cards["p1"]["prefix"]["task"] is None
    sorts = cards["sorts"]["prefix"]
    assert cards["sorts"]["routes"] == ["/v1/classify", *writes, "/v1/attention"]
    assert (sorts["task"], sorts["labels"], sorts["fields"]) == ("classify", ["animal", "tool"], ["text"])
    assert (sorts["form"], sorts["length"], sorts["zero_shot"]) == ("direct", 4, True) and sorts["parameters"] > 0
    assert cards["tells"]["prefix"]["zero_shot"] is False
    assert cards["pairs"]["prefix"]["fields"] == ["one", "two"] and "/v1/classify" not in cards["pairs"]["routes"]
    assert cards["many"]["prefix"]["multi_label"] is True and "/v1/classify" not in cards["many"]["routes"]
    about = cards["writes"]["prefix"]
    assert (about["task"], about["template"], about["max_new_tokens"]) == ("generate", "Text: {prompt}\n", 24)
    assert httpx.get(f"{server.url}/v1/models/writes").json() == cards["writes"]
