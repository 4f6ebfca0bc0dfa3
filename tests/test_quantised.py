"""Bases quantised by bitsandbytes, on a CPU: trained, saved, loaded as they were, and refused with a reason."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import save_tiny, tiny_config
from transformers import LlamaConfig

import foreword
from foreword.bases import QUANTISED, load_base
from foreword.errors import InputError
from foreword.model import PrefixModel


def quantised(folder: Path, bits: str | None) -> PrefixModel:
    model = PrefixModel(*load_base(str(folder), torch.float32, quantise=bits))
    model.add("prefix", instruction="the cat sits on the warm stone", length=6)
    return model


@pytest.mark.parametrize("form", ["direct", "projected", "mlp"])
@pytest.mark.parametrize("bits", QUANTISED)
def test_a_prefix_learns_on_a_quantised_base(tiny_llama: Path, bits: str, form: str) -> None:
    model = PrefixModel(*load_base(str(tiny_llama), torch.float32, quantise=bits))
    model.add("prefix", form=form, length=4, start="random", seed=0)
    before = {name: p.detach().clone() for name, p in model.base.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    ids = torch.arange(5, 25).view(2, 10)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert any(p.dtype in (torch.uint8, torch.int8) for p in before.values())
    assert all(torch.equal(before[name], p) for name, p in model.base.named_parameters())


@pytest.mark.parametrize(("bits", "tolerance"), [("8bit", 0.05), ("4bit", 0.25)])
def test_the_loss_is_near_the_base_s_own(tiny_llama: Path, bits: str, tolerance: float) -> None:
    ids = torch.arange(5, 25).view(2, 10)
    losses = []
    for chosen in (None, bits):
        model = quantised(tiny_llama, chosen)
        losses.append(model(input_ids=ids, labels=ids).loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=tolerance)
    assert losses[0] != losses[1]


def test_a_saved_prefix_is_loaded_on_a_base_quantised_alike(tiny_llama: Path, tmp_path: Path) -> None:
    model = quantised(tiny_llama, "4bit")
    model.save_pretrained(tmp_path / "saved")
    header = json.loads((tmp_path / "saved" / "prefix.json").read_text())
    whole = PrefixModel(*load_base(str(tiny_llama), torch.float32))
    assert header["base"]["parameters"] == whole.base_parameters
    assert header["base"]["quantisation"]["load_in_4bit"] is True
    loaded = foreword.load(tmp_path / "saved")
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    with pytest.raises(InputError, match="load it on its own base"):
        whole.load(tmp_path / "saved")


def test_a_base_that_ran_before_it_was_wrapped_trains_alike(tmp_path: Path) -> None:
    """Where the CPU has units for bfloat16, bitsandbytes packs weights then, and no gradient goes through them."""
    config = LlamaConfig(**{**tiny_config().to_dict(), "hidden_size": 64, "head_dim": 32})
    save_tiny(tmp_path, config)
    ids, found = torch.arange(5, 25).view(2, 10), []
    for runs in (0, 2):
        base, tokenizer = load_base(str(tmp_path), torch.float32, quantise="4bit")
        for _ in range(runs):
            base(ids)
        model = PrefixModel(base, tokenizer)
        model.add("prefix", length=4, start="random", seed=0)
        model(input_ids=ids, labels=ids).loss.backward()
        found.append((model.fingerprint, [p.grad for p in model.parameters() if p.requires_grad]))
    (fingerprint, gradients), (again, packed) = found
    assert fingerprint == again
    for gradient, other in zip(gradients, packed, strict=True):
        assert gradient.norm() > 0 and (gradient - other).norm() < 0.05 * gradient.norm()


def test_what_cannot_be_quantised(tiny_llama: Path) -> None:
    with pytest.raises(InputError, match="cannot be quantised to '3bit'; choose 4bit or 8bit"):
        load_base(str(tiny_llama), quantise="3bit")
    with pytest.raises(InputError, match="a quantised base cannot be sharded"):
        load_base(str(tiny_llama), quantise="4bit", shards=2)


def test_without_bitsandbytes(tiny_llama: Path) -> None:
    script = (
        "import sys; sys.modules['bitsandbytes'] = None\n"
        "from foreword import InputError, load_base\n"
        "try: load_base(sys.argv[1], quantise='8bit')\n"
        "except InputError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", script, str(tiny_llama)], capture_output=True, text=True, timeout=300)
    assert run.stdout == f"the model {tiny_llama} cannot be quantised: install foreword[quantised].\n", run.stderr
