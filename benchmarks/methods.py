"""The ways of adapting one frozen base that compare.py sets side by side, each as its own users would write it.

A method is a module to train, a loss of a batch, and logits of the labels `[rows, labels]`. foreword's are its default
head's. The others' are those of the labels' words, where there is one for each, and else of foreword's head, which
starts and learns as it does there; a name that ends in `-head` has that head in any case. Batches are those of
`PrefixClassifier.collate`: the same rows, template and padding for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import CartridgeConfig, LoraConfig, PrefixTuningConfig, get_peft_model
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_text
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from foreword.forms import PrefixConfig
from foreword.lower_layers import LowerLayers
from foreword.model import PrefixModel
from foreword.rates import LEARNING_RATES
from foreword.schemas import Row
from foreword.tasks.classify import PrefixClassifier
from foreword.tasks.output import output_layer
from foreword.tasks.template import NAMED_LABELS, default_instruction

Batch = dict[str, Tensor]
CACHED = "foreword-cached"  # the default form, with what the lower layers make of rows kept


@dataclass
class Method:
    """What is trained, how its label logits are computed, and how it generates."""

    name: str
    module: nn.Module
    logits: Callable[[Batch], Tensor]
    generate: Callable[..., Tensor]
    learning_rate: float | None = None
    head: nn.Module | None = None

    def parameters(self) -> list[nn.Parameter]:
        """What is trained, the head apart."""
        head = {id(p) for p in self.head_parameters()}
        return [p for p in self.module.parameters() if p.requires_grad and id(p) not in head]

    def head_parameters(self) -> list[nn.Parameter]:
        return [] if self.head is None else list(self.head.parameters())

    def loss(self, batch: Batch) -> Tensor:
        return cross_entropy(self.logits(batch).float(), batch["labels"])


def classifier_on(
    base: Any,
    tokenizer: Any,
    labels: list[str],
    max_length: int,
    rows: Sequence[Row] = (),
    read: bool = True,
    head: str = "auto",
    **prefix: Any,
) -> PrefixClassifier:
    """foreword's classifier with the settings that a user gets who sets none (but for `prefix`).

    rows: to train on, from which the prefix, where labels are many, and a linear head take their start; the head also
        where the prefix is not read.
    """
    model = PrefixModel(base, tokenizer)
    settings = {"instruction": default_instruction(labels, rows), **prefix}
    model.add("prefix", PrefixConfig(**settings))
    model.activate("prefix" if read else None)
    return PrefixClassifier.for_labels(model, labels, max_length=max_length, rows=rows, head=head)


def make(
    name: str,
    base: Any,
    tokenizer: Any,
    labels: list[str],
    max_length: int,
    length: int | None,
    rows: Sequence[Row] = (),
    whole: bool = True,
) -> Method:
    """A method on its own copy of `base`: `bare`, `foreword[-form]`, `foreword-cached`, `lora[-head]`,
    `peft-{random,zero,mlp,text,cartridge}[-head]`.

    length: virtual tokens; None leaves it to foreword's default (the instruction's own), which the others then take.
    rows: to train on, from which a linear head takes its start.
    whole: the others' logits are the vocabulary's, as their users compute them; if not, those of the labels alone, as
        foreword's are: the same numbers in less time, for where time is not what is measured.
    """
    base = deepcopy(base)
    head = "auto" if name.startswith("foreword") else _head_of_others(name, labels)
    kind, read = name.removesuffix("-head"), not name.startswith(("lora", "bare"))
    own = classifier_on(base, tokenizer, labels, max_length, rows, read, head, length=length, form=_form(name))
    if name.startswith("foreword"):
        rate = LEARNING_RATES[_form(name)]
        if name == CACHED:
            own.cache = LowerLayers(own.model, "prefix", 2**30)
        return Method(name, own, lambda batch: own(**_inputs(batch))["logits"], own.model.generate, rate, own.head)
    length = own.model.form("prefix").length
    module = base if name == "bare" else _peft(kind, base, tokenizer, labels, length)
    at_labels = own.apply_head
    if own.head is None:
        words = own.word_ids
        weight = base.get_output_embeddings().weight.detach()[words]
        at_labels = partial(linear, weight=weight)

    def logits(batch: Batch) -> Tensor:
        last = batch["attention_mask"].sum(1) - 1
        inputs = _inputs(batch)
        if name == "bare":  # the gradient of its inputs: what any prefix must at least compute
            inputs = {"inputs_embeds": base.get_input_embeddings()(inputs.pop("input_ids")).requires_grad_(), **inputs}
        each = torch.arange(len(last), device=last.device)
        if whole and own.head is None:
            return module(**inputs).logits[each, last][:, words]
        with output_layer(base, lambda hidden: at_labels(hidden[each, last])[:, None]):
            return module(**inputs).logits[:, 0]

    return Method(name, module, logits, module.generate, None, own.head)


def _inputs(batch: Batch) -> Batch:
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def _form(name: str) -> Any:
    return name.partition("-")[2] if name.startswith("foreword-") and name != CACHED else PrefixConfig().form


def _head_of_others(name: str, labels: list[str]) -> str:
    return "linear" if name.endswith("-head") or len(labels) > NAMED_LABELS else "words"


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
