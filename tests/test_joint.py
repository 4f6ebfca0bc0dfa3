"""Several tasks trained at once: each as it would be alone, with a part that all share, killed and gone on with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import interrupted_at_step
from safetensors.torch import load_file

from foreword import InputError, PrefixConfig, PrefixModel, RunError, TrainConfig, load, load_base
from foreword.batching import BucketSampler, InterleavedSampler
from foreword.cli.options import read_tasks
from foreword.compose import concatenate
from foreword.config import unfinished_config
from foreword.forms import FORMS
from foreword.joint import Behind, JointConfig, build_jointly, train_jointly
from foreword.train import load_rows, train

FAST: dict[str, Any] = {"batch_size": 4, "max_length": 40, "zero_shot": False, "save_steps": 100}


@pytest.fixture(scope="module")
def lengths(tmp_path_factory: pytest.TempPathFactory, topics: Path) -> Path:
    """Texts scored by what they are about."""
    folder = tmp_path_factory.mktemp("scores")
    for split in ("train", "validation", "test"):
        rows = [json.loads(line) for line in (topics / f"{split}.jsonl").read_text().splitlines()]
        scored = [{"text": row["text"], "score": 4.0 if row["label"] == "animal" else 1.0} for row in rows]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scored))
    return folder


def tasks(base: Path, topics: Path, scores: Path, output: Path, **settings: Any) -> JointConfig:
    given = {"model": str(base), **FAST, **settings}
    kinds = {
        "kind": TrainConfig(output / "kind", data=str(topics), **given),
        "score": TrainConfig(output / "score", data=str(scores), task="regress", **given),
    }
    return JointConfig(output, kinds, {})


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "prefix.safetensors")


def test_a_task_trained_with_others_ends_where_it_would_alone(
    tiny_llama: Path, topics: Path, lengths: Path, tmp_path: Path
) -> None:
    """To the bit, warm-up and cosine included: its rows come in the same order, at the same rates, and nothing else
    moves it."""
    joint = tasks(tiny_llama, topics, lengths, tmp_path / "joint", epochs=2, schedule="cosine")
    score = replace(joint.tasks["score"], prefix=PrefixConfig(form="mlp"), train_rows=24)
    joint = replace(joint, tasks={**joint.tasks, "score": score})
    found = train_jointly(joint)
    assert not (joint.output / "training").exists()
    for name, task in joint.tasks.items():
        alone = train(replace(task, output=tmp_path / name))
        expected, own = tensors(tmp_path / name), tensors(joint.output / name)
        assert expected.keys() == own.keys() and all(torch.equal(own[key], expected[key]) for key in own)
        assert found.tasks[name].test == alone.test
        assert found.tasks[name].summary["parameters"] == alone.summary["parameters"]
        assert found.tasks[name].summary["learning_rate"] == alone.summary["learning_rate"]
        steps = found.tasks[name].summary["validations"]
        assert [v["loss"] for v in steps] == pytest.approx([v["loss"] for v in alone.summary["validations"]])
    assert load(joint.output / "kind").predict(["the dog sleeps"])[0]["label"] in ("animal", "tool")
    assert "score" in load(joint.output / "score").predict(["the dog sleeps"])[0]


def test_batches_of_the_tasks_are_evenly_spaced_and_in_the_order_that_each_has_alone() -> None:
    lengths = [list(range(5, 45)), list(range(10, 20)), list(range(3, 11))]
    sampler = InterleavedSampler(lengths, [1.0, 2.0, 0.5], batch_size=4, seed=7)
    assert sampler.counts == [10, 5, 1] and len(sampler) == 64
    drawn: list[list[int]] = [[], [], []]
    for epoch in range(3):
        sampler.set_epoch(epoch)
        rows = list(sampler)
        assert len(rows) == 64
        owners = [0 if row < 40 else 1 if row < 50 else 2 for row in rows]
        batches = [owners[at : at + 4] for at in range(0, 64, 4)]
        assert all(len(set(batch)) == 1 for batch in batches)
        order = [batch[0] for batch in batches]
        for part, count in enumerate(sampler.counts):
            places = [place for place, owner in enumerate(order) if owner == part]
            assert len(places) == count
            assert all(abs(place - (j + 0.5) * 16 / count) < 2.5 for j, place in enumerate(places))
        for row, owner in zip(rows, owners, strict=True):
            drawn[owner].append(row - [0, 40, 50][owner])
    for part, found in enumerate(drawn):
        alone = BucketSampler(lengths[part], 4, 7)
        expected: list[int] = []
        for epoch in range(12):
            alone.set_epoch(epoch)
            expected += list(alone)
        assert found == expected[: len(found)]


def test_an_interrupted_run_goes_on_to_the_same_tensors(
    tiny_llama: Path, topics: Path, lengths: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"save_steps": 3, "train_rows": 20}
    whole = replace(tasks(tiny_llama, topics, lengths, tmp_path / "whole", **settings), shared=PrefixConfig(length=3))
    part = replace(tasks(tiny_llama, topics, lengths, tmp_path / "part", **settings), shared=whole.shared)
    train_jointly(whole)
    with interrupted_at_step(4, monkeypatch), pytest.raises(RunError, match="interrupted at step"):
        train_jointly(part)
    with pytest.raises(InputError, match="holds an unfinished run; go on with --resume"):
        train_jointly(part)
    with pytest.raises(InputError, match="a run of several tasks; resume it with foreword joint"):
        unfinished_config(part.output)
    with pytest.raises(InputError, match="a run of several tasks; resume it with foreword joint"):
        train(replace(part.tasks["kind"], output=part.output), resume=True)
    with pytest.raises(InputError, match="was started with another ratios; resume it unchanged"):
        train_jointly(replace(part, ratios={"kind": 2.0}), resume=True)
    train_jointly(part, resume=True)
    one = replace(part.tasks["kind"], output=tmp_path / "one")
    with interrupted_at_step(4, monkeypatch), pytest.raises(RunError):
        train(one)
    with pytest.raises(InputError, match="a run of one task; resume it with foreword train"):
        train_jointly(replace(part, output=one.output), resume=True)
    for name in whole.tasks:
        expected, own = tensors(whole.output / name), tensors(part.output / name)
        assert all(torch.equal(own[key], expected[key]) for key in expected)


def test_a_shared_part_is_trained_by_all_and_stands_before_each_of_them(
    tiny_llama: Path, topics: Path, lengths: Path, tmp_path: Path
) -> None:
    own = PrefixConfig(form="direct", length=2, start="vocabulary")
    config = tasks(tiny_llama, topics, lengths, tmp_path / "joint", prefix=own)
    config = replace(config, shared=replace(own, length=3, seed=1))
    joint = build_jointly(config, {name: load_rows(task) for name, task in config.tasks.items()})
    model = joint.model
    forms = [model.form(name) for name in config.tasks]
    assert all(isinstance(form, Behind) for form in forms) and forms[0].shared is forms[1].shared  # type: ignore[attr-defined]

    plain = PrefixModel(*load_base(str(tiny_llama)))
    plain.add("shared", config.shared)
    plain.add("own", own)
    for name, kv in concatenate(plain, ["shared", "own"]).sites.items():
        found = model.kv("kind").sites[name]
        assert torch.allclose(found.keys, kv.keys, atol=1e-5) and torch.equal(found.values, kv.values)

    trained = [name for name, p in joint.named_parameters() if p.requires_grad]
    assert sum(".shared." in name for name in trained) == 4  # two layers' keys and values, once
    result = train_jointly(config)
    first, second = (tensors(config.output / name) for name in config.tasks)
    for key in (key for key in first if not key.startswith("head")):
        assert torch.equal(first[key][:, :3], second[key][:, :3])
        assert not torch.equal(first[key][:, 4:], second[key][:, 4:])
    moved = first[next(key for key in first if key.endswith("values"))][:, 1:3]
    start = plain.kv("shared").sites[plain.sites[0].name].values[0, :, 1:3]
    assert not torch.equal(moved, start)
    assert result.tasks["kind"].summary["parameters"] == 2 * 2 * 2 * 8 * (2 + 1)  # a token of each part is frozen
    assert load(config.output / "kind").model.form("kind").length == 5


@pytest.mark.parametrize("form", FORMS)
def test_a_shared_part_on_a_base_in_bfloat16(
    tiny_llama: Path, topics: Path, lengths: Path, tmp_path: Path, form: str
) -> None:
    own = replace(PrefixConfig(length=2, start="vocabulary"), form=form)
    config = tasks(tiny_llama, topics, lengths, tmp_path / "joint", prefix=own, dtype="bfloat16")
    config = replace(config, shared=replace(own, length=3, seed=1))
    model = build_jointly(config, {name: load_rows(task) for name, task in config.tasks.items()}).model
    assert model.dtype == torch.bfloat16
    plain = PrefixModel(*load_base(str(tiny_llama), torch.bfloat16))
    plain.add("shared", config.shared)
    plain.add("own", own)
    for name, kv in concatenate(plain, ["shared", "own"]).sites.items():
        assert torch.allclose(model.kv("kind").sites[name].keys, kv.keys, rtol=1e-2, atol=1e-5)


def test_training_goes_on_from_a_saved_prefix(tiny_llama: Path, topics: Path, tmp_path: Path) -> None:
    first = TrainConfig(tmp_path / "first", model=str(tiny_llama), data=str(topics), **FAST)
    train(replace(first, epochs=8.0, learning_rate=0.03))
    again = replace(first, output=tmp_path / "again", start_from=str(tmp_path / "first"), max_steps=1)
    fresh = replace(first, output=tmp_path / "fresh", max_steps=1)
    assert train(again).summary["losses"][0][1] < train(fresh).summary["losses"][0][1]
    with pytest.raises(InputError, match="brings its own form, length and start; leave out"):
        train(replace(again, output=tmp_path / "other", prefix=PrefixConfig(length=4)))


# ---- the command line


def written(folder: Path, text: str) -> Path:
    path = folder / "tasks.toml"
    path.write_text(text)
    return path


def test_tasks_are_read_from_a_file_of_options(tmp_path: Path) -> None:
    text = """
    batch-size = 8
    schedule = "cosine"
    zero_shot = false
    [news]
    data = "a"
    ratio = 0.5
    label-word = ["x", "y"]
    [scores]
    data = "b"
    task = "regress"
    length = 4
    [shared]
    length = 3
    """
    config = read_tasks(written(tmp_path, text), tmp_path / "o")
    assert config.ratios == {"news": 0.5} and config.shared.length == 3 and list(config.tasks) == ["news", "scores"]
    news, scores = config.tasks.values()
    assert news.batch_size == scores.batch_size == 8 and not news.zero_shot
    assert news.schedule == scores.schedule == "cosine"
    assert news.label_words == ("x", "y") and news.output == tmp_path / "o" / "news"
    assert scores.task == "regress" and scores.prefix.length == 4 and news.prefix.length is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[a", "is not valid TOML"),
        ("[a]\nlenght = 3", r"\[a\]: No such option: --lenght.*options of foreword train"),
        ("[a]\nlength = 'x'", r"\[a\]: Invalid value for '--length'.*options of foreword train"),
        ("[a]\nratio = 'x'", r"\[a\]: ratio 'x' is no number; give one above 0"),
        ("[a]\ndata = 'x'", "takes two tasks or more, not 1"),
        ("[a]\n[b]\nbatch_size = 3", "the tasks differ in batch_size; give one for the whole run"),
        ("[a]\n[b]\nratio = 0", "the ratio of b must be above 0, not 0"),
        (
            "patience = 2\n[a]\n[b]",
            "patience, shard, keep, activation_cache are of a single task's run; leave them out",
        ),
        ("[training]\n[b]", "'training' cannot name a task"),
    ],
)
def test_what_is_wrong_with_a_file_of_tasks_is_said(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        train_jointly(read_tasks(written(tmp_path, text), tmp_path / "o"))
    assert not (tmp_path / "o").exists()


def test_what_cannot_be_trained_together_is_refused(
    tiny_llama: Path, topics: Path, lengths: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="there is no file"):
        read_tasks(tmp_path / "none.toml", tmp_path)
    config = tasks(tiny_llama, topics, lengths, tmp_path / "o")
    with pytest.raises(InputError, match="a ratio for 'other', which is no task of this run"):
        train_jointly(replace(config, ratios={"other": 1.0}))
    shared = replace(config, shared=PrefixConfig(length=2, layers=(0,)))
    with pytest.raises(InputError, match="the shared prefix enters other layers than a task's own"):
        train_jointly(shared)
    dynamic = tasks(tiny_llama, topics, lengths, tmp_path / "o", prefix=PrefixConfig(length=4, dynamic="gates"))
    with pytest.raises(InputError, match="a dynamic prefix cannot stand behind a shared one"):
        train_jointly(replace(dynamic, shared=PrefixConfig(length=2)))
    assert not (tmp_path / "o").exists()


def test_the_command_trains_all_and_says_what_each_found(
    tiny_llama: Path, topics: Path, lengths: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from foreword.cli import app

    text = f"""
    model = "{tiny_llama}"
    batch-size = 8
    max-length = 40
    [kind]
    data = "{topics}"
    [score]
    data = "{lengths}"
    task = "regress"
    """
    output = tmp_path / "jobs"
    arguments = ["joint", str(written(tmp_path, text)), "--output", str(output)]
    app(arguments, standalone_mode=False)
    shown = capsys.readouterr().out
    assert "kind" in shown and "score" in shown and "pearson" in shown and "accuracy" in shown
    assert f"foreword serve --prefixes {output}" in " ".join(shown.split())
    app(["joint", arguments[1], "--output", str(tmp_path / "again"), "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"kind", "score"} and found["kind"]["trained_with"] == ["score"]
    assert (output / "kind" / "report.html").is_file() and not (output / "training").exists()
