"""`foreword compose` and `foreword cut`: what they write does what it says, and nothing is written for bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Run

import foreword
from foreword import InputError, PrefixConfig, PrefixModel, TrainConfig, files, load_base
from foreword.compose import concatenate, interpolate
from foreword.compose import cut as cut_kv
from foreword.compose_saved import compose, cut
from foreword.examine import examine, mean_loss, validation_batches
from foreword.report import write_report
from foreword.tasks import load_task
from foreword.train import train


@pytest.fixture(scope="module")
def saved(tiny_llama: Path, topics: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefixes of one base: classifiers a and b, longer, dynamic, lora, words (its head), plain (no task), scores."""
    folder = tmp_path_factory.mktemp("saved")
    rows = [{"text": f"the cat {i}", "score": i} for i in range(24)]
    for split in ("train", "validation", "test"):
        (folder / "scores").mkdir(exist_ok=True)
        (folder / "scores" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def trained(name: str, length: int = 6, data: Path = topics, **settings: object) -> None:
        prefix = PrefixConfig(form="direct", length=length, dynamic="gates" if name == "dynamic" else None)
        config = {"max_steps": 4, "save_steps": 4, "batch_size": 8, "max_length": 40, "learning_rate": 0.2}
        where = {"output": folder / name, "model": str(tiny_llama), "data": str(data), "prefix": prefix}
        train(TrainConfig(**where, **config, zero_shot=False, **settings))  # type: ignore[arg-type]

    trained("a")
    trained("b", seed=1)
    trained("longer", length=8)
    trained("dynamic")
    trained("lora", lora=2)
    trained("words", head="words")
    trained("scores-a", data=folder / "scores", task="regress")
    model = PrefixModel(*load_base(str(tiny_llama)))
    for i, name in enumerate(("plain", "one"), 1):
        model.add(name, PrefixConfig(length=4 // i**2, seed=i))
        model.save_pretrained(folder / name, name)
    return folder


def logits(model: PrefixModel, prefix: str | None) -> torch.Tensor:
    ids = model.tokenizer("the hammer lies in the grass", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(ids, prefix=prefix).logits


@pytest.mark.parametrize(("names", "weight"), [("a b", None), ("a longer a", None), ("a b", 0.25), ("a b", 1.0)])
def test_what_is_saved_is_what_the_functions_give(
    run: Run, saved: Path, tmp_path: Path, names: str, weight: float | None
) -> None:
    parts = [saved / name for name in names.split()]
    options = [] if weight is None else ["--weight", weight]
    code, out, _ = run("compose", *parts, "--output", tmp_path / "made", *options, "--json")
    assert code == 0 and json.loads(out)["composed"]["of"] == names.split()
    task = foreword.load(tmp_path / "made")
    model = task.model
    for i, part in enumerate(parts):
        model.load(part, f"p{i}")
    own = [f"p{i}" for i in range(len(parts))]
    kv = concatenate(model, own) if weight is None else interpolate(model, "p0", "p1", weight)
    model.put("here", kv, like="p0")
    assert torch.equal(logits(model, "made"), logits(model, "here"))
    assert not torch.allclose(logits(model, "made"), logits(model, "p0"))
    heads = [files.read(part)[1]["head.weight"] for part in parts]
    assert torch.equal(task.head.weight, heads[0] if weight is None else heads[0].lerp(heads[1], weight))


def test_a_composed_prefix_goes_where_others_go(run: Run, saved: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    assert run("compose", saved / "a", saved / "b", "--output", made)[0] == 0
    header = files.read_header(made)
    settings = files.read_header(saved / "a")["training"]["settings"]
    assert header["training"].keys() == {"composed", "settings"}
    assert header["training"]["settings"]["data"] == settings["data"]
    assert header["prefix"]["length"] == 12 and header["prefix"]["parameters"] > 0
    code, out, _ = run("eval", made, "--json")
    assert code == 0 and json.loads(out)["rows"] == 8
    assert run("predict", made, "the cat sleeps", "--json")[0] == 0
    code, out, _ = run("inspect", made)
    assert code == 0 and "how: concatenated" in out
    assert run("inspect", made, "--html", tmp_path / "page.html", "--rows", 2)[0] == 0
    assert examine(made, rows=2)["moved"] is None
    assert write_report(made).is_file()
    assert run("cut", made, "--length", 5, "--output", tmp_path / "short", "--rows", 2)[0] == 0
    assert run("export", tmp_path / "short", "--to", "peft", "--output", tmp_path / "peft")[0] == 0
    where = ["--model", header["base"]["id"], "--data", settings["data"], "--output", tmp_path / "on"]
    on = ["--start-from", made, "--max-steps", 1, "--max-length", 40, "--no-zero-shot"]
    assert run("train", *where, *on)[0] == 0


def test_cut_keeps_the_tokens_that_do_most(run: Run, saved: Path, topics: Path, tmp_path: Path) -> None:
    code, out, _ = run("cut", saved / "a", "--length", 2, "--output", tmp_path / "short", "--rows", 5, "--json")
    found = json.loads(out)
    assert code == 0 and found.keys() == {"worth", "kept", "loss", "loss_cut"}
    by_size = sorted(range(6), key=lambda i: -abs(found["worth"][i]))
    assert found["kept"] == sorted(by_size[:2])
    whole, short = load_task(saved / "a"), load_task(tmp_path / "short")
    for task, loss in ((whole, found["loss"]), (short, found["loss_cut"])):
        assert mean_loss(task, validation_batches(task, None, 5, 16)) == pytest.approx(loss, abs=1e-6)
    assert torch.equal(whole.head.weight, short.head.weight) and short.settings == whole.settings
    whole.model.put("here", cut_kv(whole.model, "a", found["kept"]), like="a")
    short.model.load(saved / "a", "a")
    assert torch.equal(logits(short.model, "short"), logits(whole.model, "here"))
    assert files.read_header(tmp_path / "short")["training"]["composed"]["kept"] == found["kept"]
    rows = topics / "validation.jsonl"
    code, out, err = run("cut", saved / "a", "--length", 2, "--output", tmp_path / "shown", "--data", rows)
    assert code == 0 and out.count("yes") == 2 and "of 2 of its 6 tokens" in out and "Saved" in err


def test_progress_counts_every_pass(saved: Path, tmp_path: Path) -> None:
    passes: list[tuple[int, int]] = []
    cut(saved / "scores-a", 3, tmp_path / "short", rows=4, progress=lambda *at: passes.append(at))
    assert passes == [(i, 9) for i in range(1, 10)]


def test_lora_stays_with_a_prefix_that_is_cut(saved: Path, tmp_path: Path) -> None:
    found = cut(saved / "lora", 3, tmp_path / "short", rows=4)
    short = load_task(tmp_path / "short")
    assert files.read_header(tmp_path / "short")["combined"]
    assert mean_loss(short, validation_batches(short, None, 4, 16)) == pytest.approx(found["loss_cut"], abs=1e-6)


def test_of_a_dynamic_prefix_the_static_part_is_taken(run: Run, saved: Path, tmp_path: Path) -> None:
    code, _, err = run("compose", saved / "dynamic", saved / "a", "--weight", 0, "--output", tmp_path / "static")
    assert code == 0 and "dynamic is dynamic; what is taken of it is its static part" in err
    _, tensors = files.read(tmp_path / "static")
    _, expected = files.read(saved / "dynamic")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    assert not any(name.startswith("dynamic.") for name in tensors)
    code, _, err = run("cut", saved / "dynamic", "--length", 3, "--output", tmp_path / "short", "--rows", 3)
    assert code == 0 and "its static part" in err
    assert files.read_header(tmp_path / "short")["prefix"]["dynamic"] is None


@pytest.mark.parametrize("second", ["words", "scores-a"])
def test_heads_of_unlike_tasks_are_not_mixed(saved: Path, tmp_path: Path, second: str) -> None:
    said: list[str] = []
    compose([saved / "a", saved / second], tmp_path / "made", 0.5, say=said.append)
    assert said == ["The head is the first's: the second has none for the same task and labels."]
    assert torch.equal(files.read(tmp_path / "made")[1]["head.weight"], files.read(saved / "a")[1]["head.weight"])
    compose([saved / "words", saved / "a"], tmp_path / "words", 0.5)
    assert load_task(tmp_path / "words").head is None


def test_prefixes_without_a_task_compose(saved: Path, tmp_path: Path) -> None:
    compose([saved / "plain", saved / "plain"], tmp_path / "twice")
    compose([saved / "plain", saved / "a"], tmp_path / "first")
    for name, length in (("twice", 8), ("first", 10)):
        header = files.read_header(tmp_path / name)
        assert header["task"] is None and header["prefix"]["length"] == length
        assert header["training"].keys() == {"composed"}
        assert isinstance(foreword.load(tmp_path / name), PrefixModel)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("compose a", "compose takes two prefixes or more, not 1"),
        ("compose a b a --weight 0.5", "not 0.5 among 3"),
        ("compose a b --weight 1.5", "not 1.5 among 2"),
        ("compose a b --weight nan", "not nan among 2"),
        ("compose a b --weight half", "Input should be a valid number"),
        ("compose a longer --weight 0.5", "8, so nothing lies between them"),
        ("compose a other", "name prefixes of one base"),
        ("compose a lora", "lora was trained with LoRA or adapters on its base"),
        ("compose a nowhere", "holds no saved prefix"),
        ("compose " + "a " * 25, "150 tokens together leave no room"),
        ("cut plain --length 2", "without a task, so there is nothing to measure"),
        ("cut a --length 0", "has 6 tokens and cannot be cut to 0; keep 1 to 5"),
        ("cut a --length 6", "cannot be cut to 6"),
        ("cut a --length 2 --rows 0", "rows must be at least 1, not 0"),
        ("cut a --length 2 --data nowhere.csv", "nowhere.csv"),
        ("cut single --length 1", "has one token, so there is nothing to cut"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    run: Run, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, sentence: str
) -> None:
    for name, source, change in (
        ("other", "a", lambda header: header["base"].update(fingerprint="0" * 16)),
        ("single", "one", lambda header: header.update(task={"task": "classify"})),
    ):
        shutil.copytree(saved / source, tmp_path / name)
        header = files.read_header(tmp_path / name)
        change(header)
        (tmp_path / name / files.HEADER).write_text(json.dumps(header))
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    own = [saved / word if (saved / word).is_dir() else word for word in arguments.split()]
    code, out, err = run(*own, "--output", tmp_path / "made")
    assert code == 2 and out == ""
    assert sentence in " ".join(err.split()) and "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_output_in_use_is_not_overwritten(run: Run, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for place in (tmp_path, tmp_path / "thesis.txt"):
        for command in (["compose", saved / "a", saved / "b"], ["cut", saved / "a", "--length", 2]):
            code, _, err = run(*command, "--output", place)
            assert code == 2 and "exists and is not empty" in err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(InputError, match="exists and is not empty"):
        cut(saved / "a", 2, saved / "a")
