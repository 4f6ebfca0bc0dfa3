"""PEFT both ways: PEFT itself reads what foreword wrote and writes what foreword reads; logits are equal."""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

peft = pytest.importorskip("peft", reason="PEFT is not installed: nothing to exchange with (pip install peft)")

import torch  # noqa: E402
import transformers  # noqa: E402
from peft import CartridgeConfig, PeftModel, PrefixTuningConfig, get_peft_model  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor  # noqa: E402

from foreword import cli, files  # noqa: E402
from foreword.errors import InputError  # noqa: E402
from foreword.interop import carried  # noqa: E402
from foreword.interop import peft as interop  # noqa: E402
from foreword.model import PrefixModel  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
TOLERANCE = 1e-5
SPECIAL = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "initializer_range": 0.15}
GROUPED = {**SPECIAL, **SIZES, "num_hidden_layers": 3, "num_key_value_heads": 2, "max_position_embeddings": 64}
TOKENS = torch.randint(3, 64, (3, 24), generator=torch.Generator().manual_seed(1))
P = 5


def make(family: str) -> transformers.PreTrainedModel:
    """A tiny random causal model."""
    config = {
        "llama": lambda: transformers.LlamaConfig(**GROUPED),
        "qwen3": lambda: transformers.Qwen3Config(**GROUPED, head_dim=16),
        "mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=7),
        "gpt2": lambda: transformers.GPT2Config(
            **SPECIAL, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=0.15
        ),
    }[family]()
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


FAMILIES = pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "mistral"])


def ours_on(base: transformers.PreTrainedModel, **settings: Any) -> PrefixModel:
    """A prefix whose changes are random."""
    model = PrefixModel(deepcopy(base))
    window = "slides" if any(site.window for site in model.sites) else "visible"
    form = model.add("p", **{"length": P, "window": window, **settings})
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in form.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return model


@torch.no_grad()
def logits(model: Any, ids: Tensor = TOKENS, **inputs: Any) -> Tensor:
    return model(input_ids=ids, **inputs).logits


def saved(base: transformers.PreTrainedModel, folder: Path) -> Path:
    """The base as a folder that `--model` takes."""
    from conftest import ROWS, make_tokenizer

    base.save_pretrained(folder)
    make_tokenizer([text for text, _ in ROWS]).save_pretrained(folder)
    return folder


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@FAMILIES
@pytest.mark.parametrize("form", ["direct", "mlp", "projected"])
def test_peft_loads_what_is_exported_with_equal_logits(family: str, form: str, tmp_path: Path) -> None:
    base = make(family)
    ours = ours_on(base, form=form)
    ours.save_pretrained(tmp_path / "ours")
    assert interop.export(tmp_path / "ours", tmp_path / "peft") == []
    assert sorted(p.name for p in (tmp_path / "peft").iterdir()) == [interop.CONFIG, interop.WEIGHTS]
    theirs = PeftModel.from_pretrained(deepcopy(base), tmp_path / "peft").eval()
    assert difference(logits(ours), logits(theirs)) < TOLERANCE
    assert difference(logits(ours), logits(base)) > 0.1
    mask = torch.ones_like(TOKENS)
    tokens = {"input_ids": TOKENS, "attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(ours.generate(**tokens), theirs.generate(**tokens))


KINDS = {
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P),
    "projection": lambda: PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=24
    ),
    "cartridge": lambda: CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, num_frozen_tokens=2),
}


@FAMILIES
@pytest.mark.parametrize("kind", KINDS)
def test_pefts_checkpoints_are_imported_with_equal_logits(family: str, kind: str, tmp_path: Path) -> None:
    base = make(family)
    where = saved(base, tmp_path / "base")
    torch.manual_seed(3)
    theirs = get_peft_model(deepcopy(base), KINDS[kind]()).eval()
    theirs.save_pretrained(tmp_path / "peft")
    assert interop.import_(tmp_path / "peft", tmp_path / "ours", str(where)) == []
    ours = PrefixModel.from_pretrained(tmp_path / "ours")
    assert difference(logits(ours), logits(theirs)) < TOLERANCE
    assert difference(logits(ours), logits(base)) > 0.1
    assert files.read_header(tmp_path / "ours")["prefix"]["length"] == P


@pytest.mark.parametrize("kind", KINDS)
def test_the_encoders_own_parameters_are_folded_in(kind: str, tmp_path: Path) -> None:
    """As a training checkpoint holds them, under `prompt_encoder.default.`."""
    theirs = get_peft_model(make("llama"), KINDS[kind]())
    state = {k: v.contiguous() for k, v in theirs.state_dict().items() if k.startswith("prompt_encoder.")}
    assert state
    found = interop.prompt_embeddings(state, tmp_path)
    expected = theirs.get_prompt_embedding_to_save("default")
    assert difference(found, expected) < 1e-6


@FAMILIES
def test_round_trips_give_the_same_numbers(family: str, tmp_path: Path) -> None:
    base = make(family)
    where = saved(base, tmp_path / "base")
    ours_on(base).save_pretrained(tmp_path / "one")
    interop.export(tmp_path / "one", tmp_path / "peft")
    interop.import_(tmp_path / "peft", tmp_path / "two", str(where))
    first, second = (files.read(tmp_path / name) for name in ("one", "two"))
    assert first[1].keys() == second[1].keys()
    assert all(torch.equal(first[1][k], second[1][k]) for k in first[1])
    interop.export(tmp_path / "two", tmp_path / "again")
    weights = [load_file(tmp_path / name / interop.WEIGHTS)["prompt_embeddings"] for name in ("peft", "again")]
    assert torch.equal(*weights)


# ---- what cannot be carried


def header(**changes: Any) -> dict[str, Any]:
    site = {"name": "layer.0", "kind": "decoder", "window": None, "keys": [2, P, 8], "values": [2, P, 8]}
    prefix = {"form": "direct", "layers": None, "positions": "after", "window": "visible"}
    made = {"base": {"shared_layers": 0}, "prefix": prefix, "sites": [site]}
    for path, value in changes.items():
        part, key = path.split("_", 1)
        (made["sites"][0] if part == "site" else made[part])[key] = value
    return made


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prefix_form": "retrieved"}, "form 'retrieved' computes keys and values from each input"),
        ({"prefix_dynamic": "mixture"}, "form 'mixture' computes keys and values from each input"),
        ({"site_kind": "encoder"}, "enters encoder attention"),
        ({"site_kind": "cross"}, "enters cross attention"),
        ({"prefix_layers": [0, 2]}, r"only layers \[0, 2\]"),
        ({"prefix_positions": "kept"}, "keeps positions from 0"),
        ({"site_window": 128}, "visible in sliding windows .of 128 tokens."),
        ({"base_shared_layers": 3}, "3 layers of its base read another layer's"),
    ],
)
def test_what_a_cache_cannot_carry_is_refused_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    carried.check_carried(header(), "PEFT")
    with pytest.raises(InputError, match=f"PEFT cannot carry this prefix: .*{reason}"):
        carried.check_carried(header(**changes), "PEFT")


def test_a_prefix_trained_with_adapters_is_refused() -> None:
    with pytest.raises(InputError, match="trained with adapters on its base"):
        carried.check_carried({**header(), "combined": {"lora": {}}}, "PEFT")


def test_a_sliding_prefix_is_carried_and_an_unknown_window_is_not() -> None:
    carried.check_carried(header(site_window=128, prefix_window="slides"), "PEFT")
    old = header()
    del old["sites"][0]["window"]
    with pytest.raises(InputError, match="does not say which layers have sliding windows"):
        carried.check_carried(old, "PEFT")


def test_every_fixed_form_is_carried() -> None:
    from foreword.forms import FORMS

    assert set(carried.FIXED_FORMS) <= set(FORMS)


def test_real_prefixes_that_do_not_fit_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    ours_on(make("mistral"), window="visible").save_pretrained(tmp_path / "window")
    ours_on(make("llama"), layers=(0, 2)).save_pretrained(tmp_path / "layers")
    for name, reason in (("window", "sliding windows .of 7 tokens."), ("layers", "only layers")):
        with pytest.raises(InputError, match=reason):
            interop.export(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_of_different_shape_are_refused(tmp_path: Path) -> None:
    ours = ours_on(make("llama"))
    ours.save_pretrained(tmp_path / "p")
    head, tensors = files.read(tmp_path / "p")
    name = head["sites"][1]["name"]
    tensors[f"{name}.keys"] = tensors[f"{name}.keys"][:1]
    head["sites"][1]["keys"][0] = 1
    files.write(tmp_path / "p", head, tensors)
    with pytest.raises(InputError, match="differ in heads and head size"):
        interop.export(tmp_path / "p", tmp_path / "out")


def test_a_layout_that_peft_makes_for_old_caches_is_refused(tmp_path: Path) -> None:
    ours = ours_on(make("llama"))
    ours.save_pretrained(tmp_path / "p")
    head, tensors = files.read(tmp_path / "p")
    head["base"]["model"] = "GPTBigCodeForCausalLM"
    files.write(tmp_path / "p", head, tensors)
    with pytest.raises(InputError, match="GPTBigCodeForCausalLM is made for caches"):
        interop.export(tmp_path / "p", tmp_path / "out")


def test_task_and_head_are_left_behind_with_a_sentence(tmp_path: Path) -> None:
    ours = ours_on(make("llama"))
    task = {"task": "classify", "labels": ["a", "b"], "label_words": None}
    ours.save_pretrained(tmp_path / "p", task=task, extra={"head.weight": torch.zeros(2, 32)})
    notes = interop.export(tmp_path / "p", tmp_path / "out")
    assert "The task (classify) is not carried" in notes[0]
    assert "The trained head is not carried" in notes[1]
    ours.save_pretrained(tmp_path / "p", task={**task, "label_words": [" a", " b"]})
    assert len(interop.export(tmp_path / "p", tmp_path / "out")) == 1


# ---- checkpoints that are not right


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    get_peft_model(make("llama"), KINDS["prefix"]()).save_pretrained(tmp_path / "peft")
    return tmp_path / "peft"


def rewrite(checkpoint: Path, **changes: Any) -> None:
    path = checkpoint / interop.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(checkpoint: Path, match: str, base: str | None = None) -> None:
    with pytest.raises(InputError, match=match):
        interop.import_(checkpoint, checkpoint.parent / "out", base)
    assert not (checkpoint.parent / "out").exists()


def test_other_methods_and_encoder_decoders_are_refused(checkpoint: Path) -> None:
    rewrite(checkpoint, task_type="SEQ_2_SEQ_LM")
    refused(checkpoint, "for an encoder-decoder, where PEFT leaves half")
    rewrite(checkpoint, peft_type="LORA")
    refused(checkpoint, "checkpoint of LORA")
    (checkpoint / interop.CONFIG).write_text("{")
    refused(checkpoint, "not valid JSON")
    (checkpoint / interop.CONFIG).unlink()
    refused(checkpoint, "adapter_config.json is missing")


def test_a_checkpoint_without_base_weights_or_prefix_is_refused(checkpoint: Path) -> None:
    rewrite(checkpoint, base_model_name_or_path=None)
    refused(checkpoint, "give it with --model")
    base = str(saved(make("llama"), checkpoint.parent / "base"))
    save_file({"something": torch.zeros(1)}, checkpoint / interop.WEIGHTS)
    refused(checkpoint, "holds no prefix: it has something", base)
    (checkpoint / interop.WEIGHTS).write_bytes(b"damaged")
    refused(checkpoint, "is damaged", base)
    (checkpoint / interop.WEIGHTS).unlink()
    refused(checkpoint, "foreword reads no pickle", base)


def test_a_checkpoint_of_another_base_is_refused(checkpoint: Path) -> None:
    refused(checkpoint, "does not fit", str(saved(make("qwen3"), checkpoint.parent / "qwen")))
    torch.manual_seed(0)
    bert = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=64, num_hidden_layers=2, **SIZES))
    refused(checkpoint, "no decoder whose text can follow a cache", str(saved(bert, checkpoint.parent / "bert")))


def test_trained_modules_beside_the_prefix_are_left_behind_with_a_sentence(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / interop.WEIGHTS)
    save_file({**tensors, "base_model.score.weight": torch.zeros(2, 32)}, checkpoint / interop.WEIGHTS)
    base = str(saved(make("llama"), checkpoint.parent / "base"))
    assert "base_model.score.weight" in interop.import_(checkpoint, checkpoint.parent / "out", base)[0]


def test_a_folder_with_other_files_is_not_replaced(checkpoint: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years")
    ours_on(make("llama")).save_pretrained(tmp_path / "p")
    base = str(saved(make("llama"), tmp_path / "base"))
    for call in (
        lambda: interop.export(tmp_path / "p", precious),
        lambda: interop.import_(checkpoint, precious, base),
    ):
        with pytest.raises(InputError, match="holds other files"):
            call()
    assert (precious / "thesis.tex").read_text() == "years"


def test_an_imported_prefix_trains_on(checkpoint: Path, tmp_path: Path) -> None:
    base = make("llama")
    interop.import_(checkpoint, tmp_path / "ours", str(saved(base, tmp_path / "base")))
    model = PrefixModel(deepcopy(base))
    form = model.load(tmp_path / "ours", trainable=True)
    assert form.count() == form().numel()
    assert model.configs["ours"].frozen_tokens == 0


# ---- the command line


def test_export_and_import_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["foreword", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), capsys.readouterr().err

    base = saved(make("llama"), tmp_path / "base")
    task = {"task": "classify", "labels": ["a", "b"], "label_words": [" a", " b"]}
    ours_on(make("llama")).save_pretrained(tmp_path / "p", task=task)
    code, err = run("export", tmp_path / "p", "--to", "peft", "--output", tmp_path / "peft")
    assert code == 0 and "The task (classify) is not carried" in err and "Written to" in err
    code, err = run("import", tmp_path / "peft", "--from", "peft", "--output", tmp_path / "q", "--model", base)
    assert code == 0 and "Saved" in err
    assert torch.equal(*(files.read(tmp_path / n)[1]["model.layers.1.self_attn.keys"] for n in ("p", "q")))
    code, err = run("import", tmp_path / "p", "--from", "peft", "--output", tmp_path / "r")
    assert code == 2 and "is no PEFT checkpoint: adapter_config.json is missing" in err
    assert run("export", tmp_path / "p", "--to", "magic", "--output", tmp_path / "r")[0] == 2
    ours_on(make("mistral"), window="visible").save_pretrained(tmp_path / "w")
    code, err = run("export", tmp_path / "w", "--to", "peft", "--output", tmp_path / "r")
    assert code == 2 and "PEFT cannot carry this prefix" in err and "Traceback" not in err
    assert not (tmp_path / "r").exists()
