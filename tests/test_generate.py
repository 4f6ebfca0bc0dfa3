"""The task generate: its loss against plain cross-entropy, on decoders and encoder-decoders; templates; decoding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import ROWS, save_tiny
from torch import nn
from transformers import AutoModelForSeq2SeqLM, BartConfig, T5Config

from foreword import InputError, PrefixConfig, PrefixModel, TrainConfig, load, load_base
from foreword.data import Data, load_data
from foreword.evaluate import evaluate
from foreword.schemas import Row
from foreword.tasks.generate import GENERATE, PrefixGenerator
from foreword.tasks.metrics import final_answer, generation_metrics
from foreword.tasks.output import OutputLayer, hidden_before_output
from foreword.train import train

PAIRS = [Row(text, f"{label} it is" + " indeed" * (i % 3)) for i, (text, label) in enumerate(ROWS)]
SMALL = {"vocab_size": 400, "pad_token_id": 2, "eos_token_id": 1}


@pytest.fixture(scope="module")
def bases(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "d_model": 32, "max_position_embeddings": 64}
    bart = BartConfig(**SMALL, **heads, **sizes, bos_token_id=0, decoder_start_token_id=1, forced_eos_token_id=None)
    t5 = T5Config(**SMALL, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=2)
    return {
        "llama": tiny_llama,
        "bart": save_tiny(folder / "bart", bart, AutoModelForSeq2SeqLM),
        "t5": save_tiny(folder / "t5", t5, AutoModelForSeq2SeqLM),
    }


def generator(path: Path, sites: tuple[str, ...] | None = None, **settings: object) -> PrefixGenerator:
    model = PrefixModel(*load_base(str(path)))
    model.add("p", PrefixConfig(length=5, sites=sites))  # type: ignore[arg-type]
    return PrefixGenerator.for_data(model, **{"max_length": 32, "max_new_tokens": 16, **settings})  # type: ignore[arg-type]


def plain_loss(made: PrefixGenerator, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy over every position and word, by the base's own forward."""
    labels, inputs = batch["labels"], {k: v for k, v in batch.items() if k != "labels"}
    if made.model.kind == "encoder-decoder":
        start = torch.full_like(labels[:, :1], made.model.config.decoder_start_token_id)
        before = labels[:, :-1].where(labels[:, :-1] >= 0, torch.tensor(2))
        logits = made.model(**inputs, decoder_input_ids=torch.cat([start, before], 1)).logits
    else:
        logits, labels = made.model(**inputs).logits[:, :-1], labels[:, 1:]
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


@pytest.mark.parametrize("family", ["llama", "bart", "t5"])
def test_the_loss_and_its_gradient_are_plain_cross_entropy_s(bases: dict[str, Path], family: str) -> None:
    made = generator(bases[family])
    batch = made.collate(made.examples(PAIRS)[0])
    assert (batch["labels"] == -100).any()
    gradients = []
    for loss in (made(**batch)["loss"], plain_loss(made, batch)):
        made.zero_grad()
        loss.backward()
        gradients.append([p.grad.clone() for p in made.parameters() if p.requires_grad])
        gradients[-1].append(loss.detach())
    assert len(gradients[0]) > 1
    for found, expected in zip(*gradients, strict=True):
        assert torch.allclose(found, expected, atol=1e-5, rtol=1e-4)
    assert any(gradient.abs().max() > 1e-4 for gradient in gradients[0][:-1])


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_chunks_of_any_size_are_exact_with_a_soft_cap_too(bases: dict[str, Path], chunk: int) -> None:
    made = generator(bases["llama"])
    output = OutputLayer(made.model)
    output.softcap, output.factor = 5.0, 0.7
    hidden = torch.randn(7, 32, requires_grad=True)
    targets = torch.arange(7)
    (found,) = torch.autograd.grad(output.cross_entropy(hidden, targets, chunk) * 3, hidden)
    (expected,) = torch.autograd.grad(nn.functional.cross_entropy(output.logits(hidden), targets) * 3, hidden)
    assert torch.allclose(found, expected, atol=1e-6)


def test_the_whole_tensor_of_logits_is_never_made(bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    made = generator(bases["llama"])
    sizes: list[int] = []
    logits = OutputLayer.logits
    monkeypatch.setattr(OutputLayer, "logits", lambda self, h: sizes.append(h.shape[0]) or logits(self, h))
    monkeypatch.setattr("foreword.tasks.output.CHUNK", 4 * 400)
    batch = made.collate(made.examples(PAIRS)[0])
    made(**batch)["loss"].backward()
    assert max(sizes) == 4 and sum(sizes) == made.items(batch) < batch["labels"].numel()


def test_a_trained_output_layer_gets_its_gradient(bases: dict[str, Path]) -> None:
    made = generator(bases["llama"])
    weight = made.model.base.lm_head.weight.requires_grad_(True)
    made(**made.collate(made.examples(PAIRS)[0]))["loss"].backward()
    assert weight.grad is not None and weight.grad.abs().max() > 0


def test_a_base_whose_logits_are_made_in_an_unknown_way_is_refused(bases: dict[str, Path]) -> None:
    made = generator(bases["llama"])
    forward = made.model.base.forward

    def changed(*args: object, **kwargs: object) -> object:
        out = forward(*args, **kwargs)
        out.logits = out.logits.sin()
        return out

    made.model.base.forward = changed
    with pytest.raises(InputError, match="makes its logits in a way that foreword does not know"):
        OutputLayer(made.model)


def test_hidden_states_come_without_a_trace_left_on_the_base(bases: dict[str, Path]) -> None:
    made = generator(bases["bart"])
    bias = made.model.base.final_logits_bias
    batch = made.collate(made.examples(PAIRS)[0])
    hidden = hidden_before_output(
        made.model, made.base_inputs(batch["input_ids"], batch["attention_mask"], None)[0], None
    )
    assert hidden.shape[1:] == (1, 32)
    assert made.model.base.final_logits_bias is bias
    assert "forward" not in vars(made.model.base.get_output_embeddings())


@pytest.mark.parametrize("family", ["bart", "t5"])
@pytest.mark.parametrize("sites", [("encoder",), ("decoder",), ("cross",), ("encoder", "cross"), None])
def test_each_kind_of_site_is_entered_or_not(
    bases: dict[str, Path], family: str, sites: tuple[str, ...] | None, tmp_path: Path
) -> None:
    made = generator(bases[family], sites)
    kinds = {site.name: site.kind for site in made.model.sites}
    entered = {kinds[name] for name in made.model.kv("p").sites}
    assert entered == set(sites or ("encoder", "decoder", "cross"))
    batch = made.collate(made.examples(PAIRS)[0])
    made(**batch)["loss"].backward()
    trained = [p for p in made.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
    made.save_pretrained(tmp_path / "p")
    again = load(tmp_path / "p")
    assert again.model.configs["p"].sites == sites
    with torch.no_grad():
        assert torch.equal(again(**batch)["loss"], made.eval()(**batch)["loss"])


def test_sites_that_are_not_there_are_refused(bases: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="the base has decoder sites alone, not all of cross"):
        generator(bases["llama"], ("cross",))
    with pytest.raises(InputError, match="sites magic are unknown"):
        PrefixConfig(sites=("magic",))  # type: ignore[arg-type]


def test_the_prompt_is_cut_and_the_completion_too_and_both_are_said(bases: dict[str, Path]) -> None:
    made = generator(bases["llama"], template="Q {prompt}\nA ")
    rows = [Row("word " * 60, "short"), Row("word", "long " * 60), Row("word", "short")]
    examples, cut = made.examples(rows)
    assert cut == [True, True, False]
    tokenizer = made.model.tokenizer
    for example in examples:
        prompt = [i for i, label in zip(example["input_ids"], example["labels"], strict=True) if label == -100]
        assert tokenizer.decode(prompt).startswith("Q word") and tokenizer.decode(prompt).endswith("\nA ")
    assert examples[2]["labels"][-1] == tokenizer.eos_token_id
    assert sum(label != -100 for label in examples[1]["labels"]) == 16


def test_a_chat_template_stands_around_the_prompt(bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    made = generator(bases["llama"])
    with pytest.raises(InputError, match="has no chat template"):
        PrefixGenerator.for_data(made.model, chat=True)
    message = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    made.model.tokenizer.chat_template = f"<s>{message}{{% if add_generation_prompt %}}[bot]{{% endif %}}"
    settings = {"chat": True, "max_length": 32, "max_new_tokens": 8}
    chat = PrefixGenerator.for_data(made.model, **settings)
    assert chat.settings.template == "<s>[user]{prompt}[bot]"
    monkeypatch.setattr("foreword.tasks.generate.opening_ids", lambda tokenizer: [0])
    chat = PrefixGenerator.for_data(made.model, **settings)
    assert chat.settings.template == "[user]{prompt}[bot]"  # the prefix holds what opens every text
    with pytest.raises(InputError, match="leave out one"):
        PrefixGenerator.for_data(made.model, chat=True, template="{prompt}")


def test_predictions_are_those_of_generate_whatever_the_batch(bases: dict[str, Path]) -> None:
    made = generator(bases["llama"], max_new_tokens=6)
    prompts = [text for text, _ in ROWS]
    alone = [made.predict([prompt])[0] for prompt in prompts]
    assert made.predict(prompts, batch_size=3) == alone == made.predict(prompts)
    ids = torch.tensor([made._template([(prompts[0],)])[0][0]])
    own = made.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    text = made.model.tokenizer.decode(own[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert alone[0]["completion"] == text
    sampled = [made.predict(prompts, temperature=2.0, seed=seed) for seed in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert len(made.predict(prompts[:2], beams=3)) == 2


@pytest.mark.parametrize("family", ["llama", "bart", "t5"])
def test_a_run_learns_and_its_figures_are_those_of_evaluate(
    bases: dict[str, Path], family: str, tmp_path: Path
) -> None:
    for split in ("train", "validation", "test"):
        label = "completion" if split == "train" else "references"
        rows = [{"prompt": r.text, label: r.label if split == "train" else [r.label, "or so"]} for r in PAIRS]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"epochs": 12, "batch_size": 4, "learning_rate": 0.3, "max_length": 32, "max_new_tokens": 8, "beams": 2}
    # A form which such a rate suits, and a text that the small bases have room for.
    settings["prefix"] = PrefixConfig(form="direct", instruction="write what belongs after it")
    config = TrainConfig(tmp_path / "p", str(bases[family]), str(tmp_path), "generate", **settings)  # type: ignore[arg-type]
    summary = train(config).summary
    losses = [loss for _, loss in summary["losses"]]
    assert losses[-1] < losses[0] - 0.2
    assert set(summary["test"]) == {"bleu", "rouge1", "rouge2", "rougeL", "exact_match"} == set(summary["zero_shot"])
    assert evaluate(load(tmp_path / "p"))["metrics"] == summary["test"]


def test_a_decoder_starts_from_the_first_rows_that_there_is_room_for() -> None:
    def start(kind: str, *rows: Row) -> str:
        data = Data("rows", [], list(rows), [], [], "prompt", "completion")
        return PrefixGenerator.instruction(data, kind)

    first, second, long = PAIRS[0], Row("a cat", ("an animal", "a beast")), Row("word " * 200, "it")
    shown = f"{first.text}\n{first.label}\n\na cat\nan animal\n\n"
    assert start("decoder", first, second) == start("decoder", first, second, long, first) == shown
    sentence = start("encoder-decoder", first, second)
    assert sentence == start("decoder", long, first) and first.text not in sentence


def test_gradient_accumulation_counts_tokens(bases: dict[str, Path], tmp_path: Path) -> None:
    """Rows whose completions differ in length: two halves give the gradient of the whole."""
    from foreword.trainer import PrefixTrainer, Rows, training_arguments

    made = generator(bases["llama"])
    rows = [Row("the cat", "animal " * (1 + 3 * (i % 4))) for i in range(8)]
    whole = made.collate(made.examples(rows)[0])
    halves = [made.collate(made.examples(part)[0]) for part in (rows[:4], rows[4:7], rows[7:])]
    arguments = training_arguments(
        tmp_path, epochs=1, max_steps=1, batch_size=4, learning_rate=0.1, warmup_ratio=0, weight_decay=0,
        max_grad_norm=1, eval_steps=None, save_steps=9, seed=0, bf16=False, gradient_accumulation=3,
        gradient_checkpointing=False, schedule="constant",
    )  # fmt: skip
    trainer = PrefixTrainer(made, arguments, train_dataset=Rows([], []), data_collator=made.collate)
    made.train()
    total = trainer._get_num_items_in_batch(halves, "cpu")
    assert total == made.items(whole)
    sum(trainer.compute_loss(made, half, num_items_in_batch=total) for half in halves).backward()
    found = [p.grad.clone() for p in made.parameters() if p.requires_grad]
    made.zero_grad()
    made(**whole)["loss"].backward()
    for a, p in zip(found, (p for p in made.parameters() if p.requires_grad), strict=True):
        assert torch.allclose(a, p.grad, atol=1e-6)


def test_metrics_are_the_libraries_own() -> None:
    figures = generation_metrics(["the cat sat on the mat", "x"], [["a dog", "the cat sat on the mat"], ["y"]])
    assert figures["exact_match"] == 0.5 and figures["rougeL"] == 0.5
    assert generation_metrics(["the cat sat on the mat"] * 2, [["the cat sat on the mat"]] * 2)[
        "bleu"
    ] == pytest.approx(100)
    assert final_answer("so it is\n#### 1,234") == "1234" and final_answer(" a  b ") == "a b"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": ""}, "row 1 has an empty text"),
        ({"prompt": "a", "completion": 3}, "row 1 has int in 'completion' where a text belongs"),
        ({"prompt": "a", "references": []}, "row 1 has no reference in 'references'"),
        ({"prompt": "a"}, "no column that is clearly the label"),
    ],
)
def test_bad_tables(tmp_path: Path, row: dict[str, object], message: str) -> None:
    (tmp_path / "d.jsonl").write_text((json.dumps(row) + "\n") * 12)
    with pytest.raises(InputError, match=message):
        load_data(tmp_path / "d.jsonl", GENERATE)


def test_encoders_and_bad_settings_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM, BertConfig

    widths = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    path = save_tiny(tmp_path / "bert", BertConfig(vocab_size=400, **widths), AutoModelForMaskedLM)
    with pytest.raises(InputError, match="is an encoder and generates no text"):
        generator(path)
    with pytest.raises(InputError, match="text 2 is empty; there is nothing to continue"):
        generator(bases["llama"]).predict(["a", " "])
    config = TrainConfig(tmp_path / "p", task="generate", head="linear")
    with pytest.raises(InputError, match="the task generate has no setting head"):
        config.task_options(PrefixGenerator.options)
