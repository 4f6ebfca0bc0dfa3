"""Regression, token labels, answers, pairs and several labels: targets, losses, predictions, tables, every base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROWS, Run, save_tiny
from torch import nn
from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM, BartConfig, BertConfig, T5Config

from foreword import InputError, PrefixConfig, PrefixModel, TrainConfig, load, load_base
from foreword.data import Data, load_classification, load_data
from foreword.evaluate import evaluate
from foreword.schemas import Row
from foreword.tasks import TASKS, load_task, task_class
from foreword.tasks.answer import ANSWER, PrefixAnswerer, best_span
from foreword.tasks.classify import PrefixClassifier
from foreword.tasks.encoding import Template, fitted
from foreword.tasks.label import LABEL, PrefixLabeller, entities_of
from foreword.tasks.metrics import (
    answer_metrics,
    entity_metrics,
    multi_label_metrics,
    normalised,
    regression_metrics,
)
from foreword.tasks.regress import REGRESS, PrefixRegressor
from foreword.train import train

SMALL = {"vocab_size": 400, "pad_token_id": 2, "eos_token_id": 1}
FAMILIES = ["llama", "bert", "bart", "t5"]


@pytest.fixture(scope="module")
def bases(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "d_model": 32, "max_position_embeddings": 96}
    widths = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    bart = BartConfig(**SMALL, **heads, **sizes, bos_token_id=0, decoder_start_token_id=1)
    t5 = T5Config(**SMALL, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=2)
    return {
        "llama": tiny_llama,
        "bert": save_tiny(folder / "bert", BertConfig(**SMALL, **widths), AutoModelForMaskedLM),
        "bart": save_tiny(folder / "bart", bart, AutoModelForSeq2SeqLM),
        "t5": save_tiny(folder / "t5", t5, AutoModelForSeq2SeqLM),
    }


def model(path: Path, **settings: Any) -> PrefixModel:
    made = PrefixModel(*load_base(str(path)))
    made.add("p", PrefixConfig(length=5, **settings))
    return made


def data(rows: list[Row], labels: list[str] | None = None, text_column: str = "text") -> Data:
    return Data("rows", labels or [], rows, rows, rows, text_column, "label")


TAGS = ["O", "B-thing", "I-thing"]
SCORED = [Row((text, "the cat"), float(i % 4)) for i, (text, _) in enumerate(ROWS)]
TAGGED = [
    Row(
        tuple(text.split()),
        tuple(("B-thing", "I-thing")[i - 1] if i in (1, 2) else "O" for i in range(len(text.split()))),
    )
    for text, _ in ROWS
]
ASKED = [Row(("who?", text), ((text.split()[1], text.find(text.split()[1])),)) for text, _ in ROWS]


def task_on(name: str, made: PrefixModel) -> Any:
    if name == "regress":
        return PrefixRegressor.for_data(made, data(SCORED, text_column="sentence1,sentence2"), max_length=40)
    if name == "label":
        return PrefixLabeller.for_data(made, data(TAGGED, TAGS), max_length=60)
    return PrefixAnswerer.for_data(made, max_length=28, stride=4)


def assert_alike(found: list[dict[str, Any]], expected: list[dict[str, Any]], tolerance: float) -> None:
    """The same predictions, their scores up to rounding."""
    for a, b in zip(found, expected, strict=True):
        assert a | {"score": 0} == b | {"score": 0}
        assert a.get("score", 0) == pytest.approx(b.get("score", 0), abs=tolerance)


ROWS_OF = {"regress": SCORED, "label": TAGGED, "answer": ASKED}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["regress", "label", "answer"])
def test_every_parameter_trains_the_batch_does_not_matter_and_saving_keeps_all(
    bases: dict[str, Path], name: str, family: str, tmp_path: Path
) -> None:
    sites = ("encoder",) if name != "regress" and family in ("bart", "t5") else None
    made = task_on(name, model(bases[family], sites=sites))
    nn.init.normal_(made.head.weight, std=0.1)
    batch = made.collate(made.examples(ROWS_OF[name])[0])
    assert (batch["attention_mask"] == 0).any()
    made(**batch)["loss"].backward()
    trained = [(n, p) for n, p in made.named_parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for _, p in trained), [n for n, p in trained]
    texts = [row.text for row in ROWS_OF[name]]
    together, alone = made.predict(texts), [made.predict([text])[0] for text in texts]
    assert_alike(together, alone, 1e-4)
    made.save_pretrained(tmp_path / "p")
    again = load(tmp_path / "p")
    assert type(again) is type(made) and again.settings == made.settings
    assert_alike(again.predict(texts), together, 1e-5)  # what is saved is the plain layer that the head comes to
    with pytest.raises(InputError, match="holds no prefix of the task classify"):
        PrefixClassifier.from_pretrained(tmp_path / "p")


# ---- regression


def test_a_regression_s_loss_is_the_squared_error_in_deviations(bases: dict[str, Path]) -> None:
    made = task_on("regress", model(bases["llama"]))
    assert (made.settings.mean, made.settings.deviation) == (1.5, 1.25**0.5)
    out = made(**made.collate(made.examples(SCORED)[0]))
    assert torch.allclose(out["logits"], torch.full((8,), 1.5)) and float(out["loss"]) == pytest.approx(1.0)
    assert made.settings.template == "Sentence1: {sentence1}\nSentence2: {sentence2}\nScore:"
    with pytest.raises(InputError, match="every training row of rows has the score 2"):
        PrefixRegressor.for_data(made.model, data([Row("a", 2.0), Row("b", 2.0)]))


def test_correlations_are_scipy_s_and_nought_for_constants() -> None:
    figures = regression_metrics([1, 2, 3, 4], [1, 4, 9, 16])
    assert figures["spearman"] == pytest.approx(1) and 0.98 < figures["pearson"] < 0.99 and figures["mse"] == 46
    assert regression_metrics([1, 2], [3, 3]) == {"pearson": 0.0, "spearman": 0.0, "mse": 2.5}


@pytest.mark.parametrize(
    ("score", "message"),
    [(None, "has no score"), ("high", "'high' in 'score' where a number belongs"), ("nan", "give a finite number")],
)
def test_bad_scores(tmp_path: Path, score: Any, message: str) -> None:
    path = write(tmp_path, [{"sentence1": "a", "sentence2": "b", "score": score}])
    with pytest.raises(InputError, match=f"row 1 .*{message}"):
        load_data(path, REGRESS)


# ---- token labels


def test_words_are_read_at_their_first_sub_token_of_the_last_reading(bases: dict[str, Path]) -> None:
    for family in ("llama", "bert"):
        made = task_on("label", model(bases[family]))
        words = ("the", "unheard-of", "caterpillar", "é", "x")
        (example,), (cut,) = made._encode([words])
        tokenizer = made.model.tokenizer
        starts = [tokenizer.decode([example["input_ids"][i]]).strip() for i in example["first"]]
        assert not cut and all(w.startswith(s) or s == "�" for w, s in zip(words, starts, strict=True))
        assert example["first"] == sorted(set(example["first"]))
        half = len(example["input_ids"]) // 2
        assert all(i >= half for i in example["first"]) if family == "llama" else example["first"][0] < half


def test_words_that_do_not_fit_are_outside_and_said_to_be_cut(bases: dict[str, Path]) -> None:
    made = PrefixLabeller.for_data(model(bases["llama"]), data(TAGGED, TAGS), max_length=20, template="{tokens}")
    made.head.bias.data[:] = torch.tensor([0.0, 1.0, 0.0])
    (result,) = made.predict(["word " * 50])
    assert result["cut"] and len(result["tags"]) == 50
    assert result["tags"][0] == "B-thing" and result["tags"][-1] == "O"
    examples, cut = made.examples([Row(("word",) * 50, ("O",) * 50)])
    assert cut == [True] and examples[0]["labels"][-1] == -100
    with pytest.raises(InputError, match="leaves none of 3 tokens"):
        PrefixLabeller.for_data(made.model, data(TAGGED, TAGS), max_length=3, template="Tag: {tokens} now")
    with pytest.raises(InputError, match=r"must hold \{tokens\}"):
        PrefixLabeller.for_data(made.model, data(TAGGED, TAGS), template="Tag:")


def test_entities_are_counted_whole() -> None:
    true = [["B-a", "I-a", "O", "B-b"]]
    assert entity_metrics(true, [["B-a", "O", "O", "B-b"]]) == {
        "precision": 0.5,
        "recall": 0.5,
        "f1": 0.5,
        "accuracy": 0.75,
    }
    assert entities_of(["New", "York", "or", "Rome"], ["B-x", "I-x", "O", "I-x"]) == [
        {"type": "x", "text": "New York"},
        {"type": "x", "text": "Rome"},
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O", "I-x"]}, "word 2 has the tag 'I-x' after 'O'; an entity begins with B-x"),
        ({"tokens": ["a", "b"], "tags": ["B-y", "I-x"]}, "word 2 has the tag 'I-x' after 'B-y'"),
        ({"tokens": ["a"], "tags": ["person"]}, "word 1 has the tag 'person', which is no BIO"),
        ({"tokens": ["a"], "tags": [3]}, "word 1 has the tag 3, which is no BIO"),
        ({"tokens": ["a"], "tags": ["B-"]}, "word 1 has the tag 'B-', which is no BIO"),
        ({"tokens": ["a", "b"], "tags": ["O"]}, "has 2 words and 1 tags"),
        ({"tokens": ["a", " "], "tags": ["O", "O"]}, "has an empty text"),
        ({"tokens": [], "tags": []}, "has no list of words"),
        ({"tokens": ["a"], "tags": ["O"]}, "has no entity in 'tags'"),
    ],
)
def test_bad_tags(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_data(write(tmp_path, [row]), LABEL)


def test_entities_that_a_prefix_was_not_trained_for_are_refused(bases: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="rows has entities that the prefix was not trained for: 'place'"):
        task_on("label", model(bases["llama"])).check_rows([Row(("a",), ("B-place",))], "rows")


# ---- answers


def test_windows_cover_the_context_and_hold_the_answer_where_they_say(bases: dict[str, Path]) -> None:
    made = task_on("answer", model(bases["llama"]))
    context = " ".join(text for text, _ in ROWS)
    start = context.find("hammer")
    examples, cut = made.examples([Row(("what?", context), (("hammer", start),))])
    _, windows = made._windows([("what?", context)])
    assert len(windows) > 3 and cut == [False]
    assert {c for w in windows for a, b in w.spans for c in range(a, b)} >= {
        i for i, c in enumerate(context) if c != " "
    }
    assert all(len(example["input_ids"]) <= 28 for example in examples)
    held = [(e, w) for e, w in zip(examples, windows, strict=True) if e["labels"] != [-1, -1]]
    assert held and len(held) < len(windows)
    for example, window in held:
        first, last = example["labels"]
        assert context[window.spans[first][0] : window.spans[last][1]].strip() == "hammer"
        ids = example["input_ids"][example["begins"] + first : example["begins"] + last + 1]
        assert made.model.tokenizer.decode(ids).strip() == "hammer"


def test_the_loss_is_cross_entropy_over_the_context_and_not_here(bases: dict[str, Path]) -> None:
    made = task_on("answer", model(bases["bert"]))
    nn.init.normal_(made.head.weight, std=0.1)
    batch = made.collate(made.examples(ASKED)[0])
    out = made(**batch)
    losses = []
    for row in range(len(batch["labels"])):
        a, b = int(batch["begins"][row]), int(batch["ends"][row])
        for side in (0, 1):
            choices = torch.cat([torch.zeros(1), out["logits"][row, side, a:b]])
            losses.append(-choices.log_softmax(0)[1 + batch["labels"][row, side]])
    assert torch.allclose(out["loss"], torch.stack(losses).mean(), atol=1e-6)


def test_the_best_span_is_in_order_and_not_too_long() -> None:
    logits = torch.zeros(2, 50)
    logits[0, 10], logits[1, 5], logits[1, 12], logits[1, 49] = 5, 9, 3, 8
    assert best_span(logits) == (9.0, 0, 5) or best_span(logits)[0] == 9.0
    logits[0, 4] = 1
    assert best_span(logits) == (10.0, 4, 5)


def test_answers_are_compared_by_the_official_normalisation() -> None:
    assert normalised(" The  Cat's, a dog! ") == "cats dog"
    figures = answer_metrics([["the cat", "a big dog"], ["x"]], ["The big dog.", "y"])
    assert figures == {"exact_match": 0.5, "f1": 0.5}
    assert answer_metrics([["big dog"]], ["dog"])["f1"] == pytest.approx(2 / 3)
    assert answer_metrics([["the"]], ["a"])["f1"] == 1.0


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([{"text": "dog", "start": 4}], "has the answer 'dog', which is not there in its context"),
        ([{"text": "cat", "start": 5}], "has the answer 'cat', which is not there"),
        (["horse"], "has the answer 'horse', which is not there"),
        ([], "has no answer in 'answers'"),
        ({"text": [], "answer_start": []}, "has no answer in 'answers'"),
    ],
)
def test_bad_answers(tmp_path: Path, answers: Any, message: str) -> None:
    path = write(tmp_path, [{"question": "who?", "context": "the cat sat", "answers": answers}])
    with pytest.raises(InputError, match=f"row 1 {message}"):
        load_data(path, ANSWER)


def test_squad_s_own_answers_and_texts_alone_are_read(tmp_path: Path) -> None:
    for answers in ([{"text": "cat", "start": 4}], {"text": ["cat"], "answer_start": [4]}, ["cat"], "cat"):
        path = write(tmp_path, [{"question": "who?", "context": "the cat sat", "answers": answers}] * 12)
        assert load_data(path, ANSWER).train[0] == Row(("who?", "the cat sat"), (("cat", 4),))


def test_a_question_that_leaves_no_room_is_refused(bases: dict[str, Path]) -> None:
    made = task_on("answer", model(bases["llama"]))
    with pytest.raises(InputError, match="question 1 and the template leave 0 of 28 tokens"):
        made.predict([("why " * 60, "the cat")])
    with pytest.raises(InputError, match="before"):
        PrefixAnswerer.for_data(made.model, template="{context} {question}")
    with pytest.raises(InputError, match="text 1 has 1 parts; give question, context"):
        made.predict(["the cat"])


# ---- pairs and several labels


def test_the_longest_text_of_a_pair_is_cut_first(bases: dict[str, Path]) -> None:
    assert (
        fitted([3, 50], 20) == [3, 17] and fitted([50, 50], 21) in ([10, 11], [11, 10]) and fitted([3, 4], 20) == [3, 4]
    )
    template = Template(model(bases["llama"]), "A {b} B {a} C", ("a", "b"), 24)
    (ids,), (cut,) = template([("dog", "cat " * 60)])
    assert cut and len(ids) == 24
    text = template.tokenizer.decode(ids)
    assert text.startswith("A cat") and text.endswith(" B dog C")


def test_pairs_and_lists_of_labels_train_and_come_back(bases: dict[str, Path], tmp_path: Path) -> None:
    rows = [
        {"premise": text, "hypothesis": "a thing", "label": [label, "all"] if i % 2 else [label]}
        for i, (text, label) in enumerate(ROWS * 8)
    ]
    for split in ("train", "validation", "test"):
        write(tmp_path / "d", rows, f"{split}.jsonl")
    settings = {"epochs": 6, "batch_size": 8, "max_length": 60, "learning_rate": 0.02, "head_learning_rate": 0.01}
    config = TrainConfig(tmp_path / "p", str(bases["llama"]), str(tmp_path / "d"), **settings)  # type: ignore[arg-type]
    summary = train(config).summary
    assert set(summary["test"]) == {"exact_match", "micro_f1", "macro_f1"}
    assert summary["losses"][-1][1] < 0.69 == pytest.approx(summary["losses"][0][1], abs=0.01)
    made = load(tmp_path / "p")
    assert made.settings.multi_label and made.settings.fields == ("premise", "hypothesis")
    assert evaluate(made)["metrics"] == summary["test"]
    (result,) = made.predict([{"premise": "the cat", "hypothesis": "a thing"}])
    assert set(result["scores"]) == {"all", "animal", "tool"}
    assert result["labels"] == [label for label, score in result["scores"].items() if score > 0.5]
    with pytest.raises(InputError, match="one label a row, and the prefix was not trained for that"):
        made.check_rows([Row(("a", "b"), "all")], "rows")
    with pytest.raises(InputError, match="need a linear head"):
        PrefixClassifier.for_labels(made.model, ["a", "b"], head="words", multi_label=True)


def test_figures_of_several_labels() -> None:
    import numpy as np

    figures = multi_label_metrics(np.array([[1, 0], [1, 1]]), np.array([[1, 0], [1, 0]]))
    assert figures == {"exact_match": 0.5, "micro_f1": 0.8, "macro_f1": 0.5}


def test_one_label_among_lists_is_refused(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": ["x", "y"]}, {"text": "b", "label": "x"}] * 10
    with pytest.raises(InputError, match="row 2 has one label in 'label' where others have lists"):
        load_classification(write(tmp_path, rows))


# ---- the command line


def write(folder: Path, rows: list[dict[str, Any]], name: str = "d.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / name


TABLES = {
    "generate": [{"prompt": text, "completion": label} for text, label in ROWS],
    "regress": [{"sentence1": r.text[0], "sentence2": r.text[1], "score": r.label} for r in SCORED],
    "label": [{"tokens": list(r.text), "tags": list(r.label)} for r in TAGGED],
    "answer": [{"question": r.text[0], "context": r.text[1], "answers": [r.label[0][0]]} for r in ASKED],
}
TEXTS = {
    "generate": ["the cat"],
    "regress": ["the cat", "a dog"],
    "label": ["the cat sat"],
    "answer": ["who?", "a dog"],
}
FOUND = {"generate": "completion", "regress": "score", "label": "tags", "answer": "answer"}


@pytest.mark.parametrize("name", TABLES)
def test_train_eval_predict_of_every_task(bases: dict[str, Path], tmp_path: Path, name: str, run: Run) -> None:
    for split in ("train", "validation", "test"):
        write(tmp_path / "d", TABLES[name], f"{split}.jsonl")
    where = ["--model", bases["llama"], "--data", tmp_path / "d", "--output", tmp_path / "p", "--task", name]
    steps = ["--epochs", 60 if name == "answer" else 8, "--batch-size", 4, "--learning-rate", 0.03, "--max-length", 60]
    steps += ["--max-new-tokens", 6] if name == "generate" else []
    code, out, err = run("train", *where, *steps)
    assert code == 0, err
    assert "prefix" in out and "8 test rows" in out
    code, out, _ = run("eval", tmp_path / "p", "--json", "--batch-size", 4)  # as in training: more rows round otherwise
    report = json.loads(out)
    saved = load_task(tmp_path / "p")
    assert code == 0 and report["rows"] == 8
    header = saved.model.headers["p"]
    assert report["metrics"] == header["training"]["test"] and header["training"]["settings"]["task"] == name
    losses = [loss for _, loss in header["training"]["losses"]]
    assert losses[-1] < losses[0]
    assert run("eval", tmp_path / "p", "--data", tmp_path / "d" / "test.jsonl")[0] == 0
    code, out, _ = run("predict", tmp_path / "p", *TEXTS[name], "--json")
    row = json.loads(out)
    assert code == 0 and FOUND[name] in row and list(row)[: len(saved.fields)] == list(saved.fields)
    code, out, _ = run("predict", tmp_path / "p", *TEXTS[name])
    assert code == 0 and FOUND[name] in out
    code, _, err = run("predict", tmp_path / "p", "--input", tmp_path / "d" / "test.jsonl", "--output", tmp_path / "o")
    assert code == 0 and len((tmp_path / "o").read_text().splitlines()) == 8
    if name == "generate":
        code, out, _ = run("generate", tmp_path / "p", "the cat", "--json", "--beams", 2, "--max-new-tokens", 3)
        assert code == 0 and set(json.loads(out)) == {"prompt", "completion", "cut"}
    if len(saved.fields) > 1:
        code, _, err = run("predict", tmp_path / "p", "a", "b", "c")
        assert code == 2 and "a row has 2 texts" in err


def test_a_setting_or_table_of_another_task_is_refused(bases: dict[str, Path], topics: Path, tmp_path: Path) -> None:
    assert set(TASKS) == {"classify", "generate", "regress", "label", "answer"}
    with pytest.raises(InputError, match="task 'magic' is unknown; choose one of classify, generate"):
        task_class("magic")
    config = TrainConfig(tmp_path / "p", str(bases["llama"]), str(topics), "regress")
    with pytest.raises(InputError, match="'animal' in 'label' where a number belongs"):
        train(config)
    model_ = model(bases["llama"])
    model_.save_pretrained(tmp_path / "q")
    with pytest.raises(InputError, match="holds a prefix without a task"):
        load_task(tmp_path / "q")
    assert not (tmp_path / "p").exists()
