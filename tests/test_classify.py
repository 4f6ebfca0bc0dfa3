"""Classification: label words against the whole vocabulary, every kind of base, templates, words from names."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import ROWS, make_tokenizer, save_tiny
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    T5Config,
)

from foreword import InputError, PrefixClassifier, PrefixModel, load, load_base
from foreword.schemas import Row
from foreword.tasks.template import ClassifySettings, default_instruction, derive_label_words, make_settings

TEXTS = [text for text, _ in ROWS]
SMALL = {"vocab_size": 400, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}
WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
BART = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}


@pytest.fixture(scope="module")
def bases(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    layers = {"encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 64}
    bart = BartConfig(**SMALL, d_model=32, decoder_start_token_id=1, **BART, **layers)
    t5 = T5Config(vocab_size=400, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=2)
    t5.decoder_start_token_id = 2
    return {
        "llama": tiny_llama,
        "bert": save_tiny(folder / "bert", BertConfig(**SMALL, **WIDTHS), AutoModelForMaskedLM),
        "bart": save_tiny(folder / "bart", bart, AutoModelForSeq2SeqLM),
        "t5": save_tiny(folder / "t5", t5, AutoModelForSeq2SeqLM),
    }


def classifier(path: Path, **settings: object) -> PrefixClassifier:
    model = PrefixModel(*load_base(str(path)))
    model.add("p", instruction="say animal or tool", length=5)
    return PrefixClassifier.for_labels(model, ["animal", "tool"], max_length=32, **settings)


def whole_vocabulary(made: PrefixClassifier) -> torch.Tensor:
    """The same logits by the base's own forward over every position and word, one row at a time."""
    rows = []
    for ids in made.encode(TEXTS)[0]:
        ids = torch.tensor([ids])
        inputs = {"input_ids": ids}
        position = -1
        if made.model.kind == "encoder-decoder":
            inputs["decoder_input_ids"] = torch.tensor([[made.model.config.decoder_start_token_id]])
        if made.model.kind == "encoder":
            position = ids[0].tolist().index(made.model.tokenizer.mask_token_id)
        rows.append(made.model(**inputs).logits[0, position, made.word_ids])
    return torch.stack(rows)


@pytest.mark.parametrize("family", ["llama", "bert", "bart", "t5"])
def test_label_word_logits_are_those_of_the_whole_vocabulary(bases: dict[str, Path], family: str) -> None:
    made = classifier(bases[family], head="words")
    batch = made.collate([{"input_ids": ids} for ids in made.encode(TEXTS)[0]])
    assert len({len(ids) for ids in made.encode(TEXTS)[0]}) > 1  # the batch is padded
    with torch.no_grad():
        assert torch.allclose(made(**batch)["logits"], whole_vocabulary(made), atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "bert", "bart", "t5"])
def test_a_linear_head_trains_on_every_kind_of_base(bases: dict[str, Path], family: str, tmp_path: Path) -> None:
    made = classifier(bases[family], head="linear")
    batch = made.collate([{"input_ids": ids, "labels": i % 2} for i, ids in enumerate(made.encode(TEXTS)[0])])
    made(**batch)["loss"].backward()
    trained = {name for name, p in made.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in made.named_parameters() if p.requires_grad}
    assert {"head.weight", "head.bias"} < trained
    made.save_pretrained(tmp_path / "p")
    again = load(tmp_path / "p")
    assert again.predict(TEXTS) == made.predict(TEXTS)


@pytest.mark.parametrize("multi_label", [False, True], ids=["one label", "lists of labels"])
@pytest.mark.parametrize("family", ["llama", "bert", "bart", "t5"])
def test_a_linear_head_starts_from_the_names_as_far_as_they_fit(
    bases: dict[str, Path], family: str, multi_label: bool
) -> None:
    rows = [Row(text, (label,) if multi_label else label) for text, label in ROWS]
    made = classifier(bases[family], head="linear", multi_label=multi_label, rows=rows)
    assert made.head is not None
    embeddings = made.model.base.get_output_embeddings().weight
    ids = made.model.tokenizer([" animal", " tool"], add_special_tokens=False)["input_ids"]
    names = torch.stack([embeddings[name].sum(0) / len(name) ** 0.5 for name in ids])
    direction, weight = names - names.mean(0), made.head.plain()["weight"]
    fit = float((weight.detach() * direction).sum() / direction.square().sum())
    assert fit >= 0 and torch.allclose(weight, fit * direction, rtol=1e-4, atol=1e-5)
    examples, _ = made.examples(rows)
    logits = torch.stack(made.logits(examples, 4, "p"))
    assert torch.allclose(logits.mean(0), torch.zeros(2), atol=1e-5)
    targets = torch.tensor([example["labels"] for example in examples])
    assert made._loss(logits, targets) <= math.log(2) + 1e-6  # what a head of noughts has
    assert fit > 0 or logits.abs().max() < 1e-5


def test_a_linear_head_starts_at_nought_where_the_names_say_nothing(bases: dict[str, Path]) -> None:
    rows = [Row(text, label) for text in TEXTS for label in ("animal", "tool")]
    made = classifier(bases["llama"], head="linear", rows=rows)
    assert made.head is not None and not any(tensor.any() for tensor in made.head.plain().values())


@pytest.mark.parametrize("family", ["bert", "bart", "t5"])
def test_few_labels_of_other_than_decoders_are_read_off_words(bases: dict[str, Path], family: str) -> None:
    assert classifier(bases[family]).head is None


def test_a_decoder_is_read_by_a_linear_head_and_alone_by_words(bases: dict[str, Path], tmp_path: Path) -> None:
    rows = [Row(text, label) for text, label in ROWS]
    made, words = classifier(bases["llama"], rows=rows), classifier(bases["llama"], head="words")
    assert made.head is not None and made.settings.label_words == words.settings.label_words
    assert made.predict(TEXTS, prefix=None) == words.predict(TEXTS, prefix=None)  # zero-shot
    alone = classifier(bases["llama"], rows=rows, head="linear")
    assert made.predict(TEXTS) == alone.predict(TEXTS) != words.predict(TEXTS)
    assert (made.reads_base, words.reads_base, alone.reads_base) == (True, True, False)
    made.save_pretrained(tmp_path / "p")
    again = load(tmp_path / "p")
    assert again.predict(TEXTS) == made.predict(TEXTS)
    assert again.predict(TEXTS, prefix=None) == made.predict(TEXTS, prefix=None)


@pytest.mark.parametrize("head", ["words", "linear"])
def test_rows_that_name_prefixes_of_their_own_are_each_row_alone(bases: dict[str, Path], head: str) -> None:
    """In whatever order of length they come."""
    made = classifier(bases["llama"], head=head)
    made.model.add("q", instruction="name the thing that is meant", length=3)
    if made.head is not None:
        torch.nn.init.normal_(made.head.weight)
    texts = ["a cat", "the small dog runs after the big saw", "a saw", "the cat sleeps on the old saw"]
    encoded, names = made.encode(texts)[0], ["p", "q", "q", "p"]
    assert [len(ids) for ids in encoded] != sorted((len(ids) for ids in encoded), reverse=True)
    with torch.no_grad():
        together = made(**made.collate([{"input_ids": ids} for ids in encoded]), prefix=names)["logits"]
        alone = [
            made(**made.collate([{"input_ids": ids}]), prefix=name)["logits"]
            for ids, name in zip(encoded, names, strict=True)
        ]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)
    assert not torch.allclose(alone[0], alone[2], atol=1e-3)


def test_a_file_from_before_the_head_was_named_is_read_as_it_was_saved() -> None:
    saved = {
        "task": "classify",
        "max_length": 32,
        "labels": ["a", "b"],
        "template": "{text}",
        "label_words": ["a", "b"],
    }
    assert not ClassifySettings.from_dict(saved).is_linear
    assert ClassifySettings.from_dict({**saved, "label_words": None}).is_linear


def test_many_labels_take_a_linear_head_unless_words_are_asked_for(bases: dict[str, Path]) -> None:
    model, names = PrefixModel(*load_base(str(bases["llama"]))), [f"{chr(97 + i)}x" for i in range(21)]
    assert derive_label_words(names, model.tokenizer) is not None
    assert make_settings(model, names).label_words is None
    assert make_settings(model, names[:20]).label_words is not None
    assert make_settings(model, names, head="words").label_words is not None
    given = make_settings(model, names, label_words=names)
    assert given.label_words == tuple(names) and not given.is_linear


def test_the_base_s_own_output_layer_is_back_after_a_call_and_after_an_error(bases: dict[str, Path]) -> None:
    made = classifier(bases["bart"])
    bias = made.model.base.final_logits_bias
    made.predict(TEXTS)
    with pytest.raises(IndexError):
        made(torch.full((1, 3), 10**6), torch.ones(1, 3, dtype=torch.long))
    assert made.model.base.final_logits_bias is bias
    assert "forward" not in vars(made.model.base.get_output_embeddings())


def test_predictions_keep_the_order_of_the_texts_whatever_the_batch(bases: dict[str, Path]) -> None:
    made = classifier(bases["llama"])
    one = [made.predict([text])[0] for text in TEXTS]
    for size in (1, 3, 100):
        for alone, together in zip(one, made.predict(TEXTS, batch_size=size), strict=True):
            assert alone["label"] == together["label"] and abs(alone["score"] - together["score"]) < 1e-5
    assert made.predict([]) == []


def test_only_the_text_is_cut(bases: dict[str, Path]) -> None:
    made = classifier(bases["llama"], template="Text: {text}\nCategory:")
    ids, cut = made.encode(["word " * 100, "word"])
    decoded = made.model.tokenizer.decode(ids[0])
    assert cut == [True, False] and len(ids[0]) == 32
    assert decoded.startswith("Text: word") and decoded.endswith("\nCategory:")


def test_label_words_are_distinct_parts_of_the_names() -> None:
    tokenizer = make_tokenizer([" science sport card payment transfer"] * 50)
    assert derive_label_words(["science", "sport"], tokenizer) == ("science", "sport")
    words = derive_label_words(["card payment", "card transfer"], tokenizer)
    assert words in (("card payment", "transfer"), ("payment", "card transfer"))
    assert derive_label_words(["card", "card"], tokenizer) is None


def test_without_distinct_words_the_head_is_linear(bases: dict[str, Path]) -> None:
    model = PrefixModel(*load_base(str(bases["llama"])))
    assert make_settings(model, ["same", "same"]).label_words is None
    with pytest.raises(InputError, match="no distinct label words"):
        make_settings(model, ["same", "same"], head="words")
    with pytest.raises(InputError, match="a linear head has no label words"):
        make_settings(model, ["a", "b"], head="linear", label_words=["a", "b"])


def test_an_encoder_s_label_words_need_a_mask(bases: dict[str, Path]) -> None:
    model = PrefixModel(*load_base(str(bases["bert"])))
    with pytest.raises(InputError, match=r"need .mask. once"):
        make_settings(model, ["animal", "tool"], template="{text}")


def test_the_instruction_names_the_labels_unless_they_are_many() -> None:
    rows = [Row("word " * 40, "label_1"), Row("{where} is my card?", "label_2"), Row("a " * 9, ("label_3", "label_4"))]
    assert default_instruction(["a", "b"], rows) == "Read the text and say which category it belongs to: a, b.\n\n"
    labels = [f"label_{i}" for i in range(77)]
    many = "Read the text and say which of 77 categories it belongs to.\n\n"
    assert default_instruction(labels) == default_instruction(labels, rows[:1]) == many
    assert default_instruction(labels, rows, "encoder") == many
    shown = "Text: {where} is my card?\nCategory: label 2\n\nText: " + "a " * 9 + "\nCategory: label 3, label 4\n\n"
    assert default_instruction(labels, rows) == default_instruction(labels, [rows[0], rows[2], rows[1]]) == shown
    assert default_instruction(labels, [rows[0]] * 64 + rows[1:]) == many  # no more rows are looked at
    assert default_instruction(labels, [Row("a " * 12, "label_5"), *rows]) == shown
    pairs = [Row(("a", "b"), "same")]
    assert default_instruction(labels, pairs, fields=("premise", "other_side")) == (
        "Premise: a\nOther side: b\nCategory: same\n\n"
    )
