"""The ways of adapting one frozen base that compare.py sets side by side, each as its own users would write it.

A method is a module to train, a loss of a batch, and logits of the label words `[rows, labels]`. Batches are those of
`PrefixClassifier.collate`: the same rows, template and padding for all.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from peft import CartridgeConfig, LoraConfig, PrefixTuningConfig, get_peft_model
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_text
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from foreword.forms import PrefixConfig
from foreword.model import PrefixModel
from foreword.tasks.classify import PrefixClassifier
from foreword.tasks.template import default_instruction
from foreword.train import LEARNING_RATES

Batch = dict[str, Tensor]


@dataclass
class Method:
    """What is trained, how its label logits are computed, and how it generates."""

    name: str
    module: nn.Module
    logits: Callable[[Batch], Tensor]
    generate: Callable[..., Tensor]
    learning_rate: float | None = None

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.module.parameters() if p.requires_grad]

    def loss(self, batch: Batch) -> Tensor:
        return cross_entropy(self.logits(batch).float(), batch["labels"])


def classifier_on(base: Any, tokenizer: Any, labels: list[str], max_length: int, **prefix: Any) -> PrefixClassifier:
    """foreword's classifier with the settings that a user gets who sets none (but for `prefix`)."""
    model = PrefixModel(base, tokenizer)
    settings = {"instruction": default_instruction(labels), **prefix}
    model.add("prefix", PrefixConfig(**settings))
    return PrefixClassifier.for_labels(model, labels, max_length=max_length)


def make(name: str, base: Any, tokenizer: Any, labels: list[str], max_length: int, length: int | None) -> Method:
    """A method on its own copy of `base`: `bare`, `foreword[-form]`, `peft-{random,zero,mlp,text,cartridge}`, `lora`.

    length: virtual tokens; None leaves it to foreword's default (the instruction's own), which the others then take.
    """
    base = deepcopy(base)
    own = classifier_on(base, tokenizer, labels, max_length, length=length, form=_form(name))
    if name.startswith("foreword"):
        return Method(
            name, own, lambda batch: own(**_inputs(batch))["logits"], own.model.generate, LEARNING_RATES[_form(name)]
        )
    length = own.model.form("prefix").length
    words = own.word_ids
    module = base if name == "bare" else _peft(name, base, tokenizer, labels, length)

    def logits(batch: Batch) -> Tensor:
        last = batch["attention_mask"].sum(1) - 1
        inputs = _inputs(batch)
        if name == "bare":  # the gradient of its inputs: what any prefix must at least compute
            inputs = {"inputs_embeds": base.get_input_embeddings()(inputs.pop("input_ids")).requires_grad_(), **inputs}
        found = module(**inputs).logits
        return found[torch.arange(len(found)), last][:, words]

    return Method(name, module, logits, module.generate)


def _inputs(batch: Batch) -> Batch:
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def _form(name: str) -> Any:
    return name.partition("-")[2] if name.startswith("foreword-") else "direct"


def _peft(name: str, base: Any, tokenizer: Any, labels: list[str], length: int) -> nn.Module:
    if name == "lora":
        return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16))
    start = name.removeprefix("peft-")
    if start == "cartridge":
        model: Any = get_peft_model(
            base, CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=length, num_frozen_tokens=1)
        )
    else:
        mlp = {"prefix_projection": True, "encoder_hidden_size": 512} if start == "mlp" else {}
        model = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length, **mlp))
    if start == "zero":
        with torch.no_grad():
            model.prompt_encoder["default"].embedding.weight.zero_()
    if start in ("text", "cartridge"):
        text = default_instruction(labels) * (1 + length // 8)  # an instruction has more than 8 tokens
        initialize_kv_prefix_from_text(model, tokenizer, text=text, num_virtual_tokens=length, use_chat_template=False)
    return model
