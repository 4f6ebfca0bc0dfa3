"""Runs that train LoRA, adapters, gates and prompt tokens beside the prefix: learned, resumed, loaded, refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conformance.families import fresh, text
from conftest import Run, interrupted_at_step
from safetensors.torch import load_file

from foreword import InputError, PrefixConfig, RunError, TrainConfig, files, load
from foreword.combine import LEARNING_RATE, add_adapters, add_lora, apart, lora_layers, merge_lora
from foreword.drift import drift
from foreword.joint import JointConfig, train_jointly
from foreword.model import PrefixModel
from foreword.rates import LEARNING_RATES
from foreword.search import SearchConfig, search
from foreword.train import build, encoded, load_rows, make_trainer, train

FAST = {"epochs": 2, "batch_size": 8, "max_length": 40, "zero_shot": False}
EVERY = {"lora": 2, "adapters": 4, "prompt_tokens": 3}


def config(model: Path, data: Path, output: Path, **changes: object) -> TrainConfig:
    return replace(TrainConfig(output=output, model=str(model), data=str(data), **FAST), **changes)


@pytest.mark.parametrize("parts", [{"lora": 2}, {"adapters": 4}, {"prompt_tokens": 3}, EVERY])
def test_parts_learn_with_the_prefix_and_come_back(
    parts: dict[str, int], tiny_llama: Path, topics: Path, tmp_path: Path
) -> None:
    given = config(tiny_llama, topics, tmp_path / "p", **parts)
    start, data = build(given, load_rows(given)), load_rows(given)
    result = train(given)
    header = files.read_header(tmp_path / "p")
    assert set(header["combined"] or {}) == set(parts) - {"prompt_tokens"}
    assert header["prefix"]["length"] == start.model.form("prefix").length
    task = load(tmp_path / "p")
    texts = [row.text for row in data.test]
    assert task.report(data.test, task.predict(texts))["metrics"] == result.test
    begun = {name: p for name, p in start.named_parameters() if "lora_" in name or ".parts." in name}
    ended = dict(task.named_parameters())
    assert begun.keys() == {name for name in ended if "lora_" in name or ".parts." in name}
    assert not [name for name, p in begun.items() if torch.equal(p, ended[name])]
    assert result.summary["combined_parameters"] == sum(p.numel() for p in begun.values())
    assert not any(p.requires_grad for p in task.model.parameters())


def test_prompt_tokens_train_at_the_end_of_the_prefix(tiny_llama: Path, topics: Path, tmp_path: Path) -> None:
    given = config(tiny_llama, topics, tmp_path / "p", prompt_tokens=3)
    task = build(given, load_rows(given))
    before = task.model.kv("prefix").detach()
    train(given)
    after = load(tmp_path / "p").model.kv("p")
    for name, (keys, values) in after.sites.items():
        for now, then in ((keys, before.sites[name].keys), (values, before.sites[name].values)):
            assert float((now[:, :, -3:] - then[:, :, -3:]).abs().max()) > 1e-3


def test_every_part_has_its_own_rate(tiny_llama: Path, topics: Path, tmp_path: Path) -> None:
    given = config(
        tiny_llama, topics, tmp_path / "p", head="linear", head_learning_rate=0.5, learning_rate=0.25, **EVERY
    )
    data = load_rows(given)
    task = build(given, data)
    (rows, _), (validation, _) = encoded(task, data.train), encoded(task, data.validation)
    optimizer = make_trainer(given, task, rows, validation).create_optimizer()
    names = {id(p): name for name, p in task.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates.keys() == {name for name, p in task.named_parameters() if p.requires_grad}
    for name, rate in rates.items():
        kind = "head" if name.startswith("head") else "part" if "lora_" in name or ".parts." in name else "prefix"
        kind = "prompt" if name == "model.forms.prefix.change" else kind
        assert rate == {"head": 0.5, "part": LEARNING_RATE, "prompt": LEARNING_RATES["direct"], "prefix": 0.25}[kind]


def test_an_interrupted_run_goes_on_to_the_same_tensors(
    tiny_llama: Path, topics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config(tiny_llama, topics, tmp_path / "whole", **EVERY))
    cut = config(tiny_llama, topics, tmp_path / "cut", **EVERY)
    with interrupted_at_step(3, monkeypatch), pytest.raises(RunError, match="interrupted at step 3"):
        train(cut)
    train(cut, resume=True)
    first, second = (load_file(tmp_path / name / files.TENSORS) for name in ("whole", "cut"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_gated_parts_and_a_gated_prefix(tiny_llama: Path, topics: Path, tmp_path: Path) -> None:
    train(config(tiny_llama, topics, tmp_path / "p", lora=2, adapters=4, gated=True))
    header = files.read_header(tmp_path / "p")
    assert header["prefix"]["dynamic"] == "gates"
    assert header["combined"]["lora"]["gated"] and header["combined"]["adapters"]["gated"]
    gates = {n: t for n, t in load_file(tmp_path / "p" / files.TENSORS).items() if "gate" in n}
    assert gates and all(float(gate.abs().max()) > 0 for n, gate in gates.items() if n.startswith("combined"))


def test_lora_on_top_of_a_finished_prefix(tiny_llama: Path, topics: Path, tmp_path: Path) -> None:
    train(config(tiny_llama, topics, tmp_path / "first"))
    train(config(tiny_llama, topics, tmp_path / "p", start_from=str(tmp_path / "first"), lora=2))
    assert set(files.read_header(tmp_path / "p")["combined"]) == {"lora"}
    again = config(tiny_llama, topics, tmp_path / "q", start_from=str(tmp_path / "p"), lora=2)
    with pytest.raises(InputError, match="the base has LoRA already"):
        train(again)
    assert not (tmp_path / "q").exists()


def test_a_search_tries_every_trial_on_a_base_without_the_last_ones_lora(
    tiny_llama: Path, topics: Path, tmp_path: Path
) -> None:
    given = config(tiny_llama, topics, tmp_path / "s", lora=2, prompt_tokens=2)
    found = search(SearchConfig(given, ("length", "learning_rate"), trials=2))
    assert len(found.summary["trials"]) == 2
    assert files.read_header(tmp_path / "s" / "best")["combined"]["lora"]["r"] == 2
    with pytest.raises(InputError, match="prompt tokens stand behind a prefix in every layer"):
        search(SearchConfig(given, ("layers",), trials=2))


def test_the_command_takes_them(run: Run, tiny_llama: Path, topics: Path, tmp_path: Path) -> None:
    where = ["train", "--model", tiny_llama, "--data", topics, "--max-steps", 3, "--max-length", 40, "--no-zero-shot"]
    parts = ["--lora", 2, "--adapters", 4, "--prompt-tokens", 2]
    code, out, err = run(*where, "--output", tmp_path / "p", *parts, "--json")
    assert code == 0 and json.loads(out)["combined_parameters"] > 0
    assert "With it on the base: lora and adapters" in err
    code, out, _ = run("eval", tmp_path / "p", "--json")
    assert code == 0 and json.loads(out)["metrics"] == files.read_header(tmp_path / "p")["training"]["test"]
    code, out, _ = run("inspect", tmp_path / "p")
    assert code == 0 and "lora: {'r': 2" in out
    code, out, err = run("export", tmp_path / "p", "--to", "peft", "--output", tmp_path / "x")
    assert code == 2 and "adapters on its base" in err and not (tmp_path / "x").exists()
    for more, said in (
        (["--gated"], "gated is of LoRA and adapters"),
        (["--lora", -1], "lora must be 0 or more, not -1"),
        (["--prompt-tokens", 2, "--dynamic", "gates"], "is dynamic, and embeddings read one prefix for all rows"),
    ):
        code, _, err = run(*where, "--output", tmp_path / "bad", *more)
        assert code == 2 and said in err and "Traceback" not in err
        assert not (tmp_path / "bad").exists()


def test_what_belongs_to_one_run_is_refused_in_a_joint_one(tiny_llama: Path, topics: Path, tmp_path: Path) -> None:
    tasks = {name: config(tiny_llama, topics, tmp_path / "j" / name, lora=2) for name in ("a", "b")}
    with pytest.raises(InputError, match="LoRA, adapters and prompt tokens are of a single task's run"):
        train_jointly(JointConfig(tmp_path / "j", tasks, {}))


# ---- the base without what is on it


def moved_parts() -> PrefixModel:
    model = PrefixModel(fresh("llama"))
    add_lora(model, r=2)
    add_adapters(model, size=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or ".up." in name:
                parameter.normal_()
    return model


def test_the_base_is_read_apart_from_its_parts() -> None:
    model, ids = moved_parts(), text()
    expected = fresh("llama")(ids).logits
    with torch.no_grad():
        with apart(model):
            assert torch.equal(model(ids, prefix=None).logits, expected)
        changed = model(ids, prefix=None).logits
        assert float((changed - expected).abs().max()) > 1e-2
        assert float(drift(model, ids, prefix=None)) > 1e-4  # from the base as it was
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)
    merge_lora(model)
    with pytest.raises(InputError, match="LoRA is merged into the base"), apart(model):
        pass


def test_parts_are_float32_on_a_base_in_bfloat16() -> None:
    model = PrefixModel(fresh("llama").to(torch.bfloat16))
    add_lora(model, r=2)
    layers = lora_layers(model)
    assert layers and all(
        p.dtype == torch.float32 for layer in layers for n, p in layer.named_parameters() if "lora_" in n
    )
    assert model(text()).logits.dtype == torch.bfloat16


def test_parts_do_not_come_under_prefixes_that_were_trained_without(tmp_path: Path) -> None:
    model = moved_parts()
    model.add("p", PrefixConfig(length=3, start="random"))
    model.save_pretrained(tmp_path / "p")
    other = PrefixModel(fresh("llama"))
    other.add("q", PrefixConfig(length=3, start="random"))
    with pytest.raises(InputError, match="trained without them; load it on a base of its own"):
        other.load(tmp_path / "p")
    assert not other.combined and "p" not in other.forms
