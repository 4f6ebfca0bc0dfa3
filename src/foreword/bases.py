"""Loading a base: a hub id, a folder, or the embedded default; quantised, or sharded over processes, if asked for."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.distributed import DistributedConfig
from transformers.utils import logging as transformers_logging

from . import defaults
from .errors import InputError

# As transformers' BitsAndBytesConfig takes them; of 4 bits what QLoRA found best (Dettmers et al. 2023,
# arXiv:2305.14314).
QUANTISED: dict[str, dict[str, Any]] = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "8bit": {"load_in_8bit": True},
}


def load_base(
    model: str,
    dtype: torch.dtype | None = None,
    *,
    quantise: str | dict[str, Any] | None = None,
    shards: int = 1,
) -> tuple[PreTrainedModel, Any]:
    """A base with its language-model head, in evaluation mode and on the accelerator if there is one, and its tokenizer
    with a pad token.

    dtype: of the weights; by default bfloat16 for what was released in half precision, where the machine computes it
        fast, else float32.
    quantise: `4bit` or `8bit`, by bitsandbytes, or a quantization_config of transformers as a dict.
    shards: over so many processes its weights are split (FSDP2, layer by layer); each loads its own part alone.
    Raises InputError when the folder is missing, the hub cannot be reached, it is not a language model, or it cannot
    be quantised here.
    """
    source = str(defaults.model_path()) if model == defaults.MODEL else model
    looks_local = source.startswith((".", "/", "~")) or Path(source).exists()
    if looks_local and not (Path(source).expanduser() / "config.json").is_file():
        raise InputError(f"{model} is no model folder: config.json is missing; give a folder or a hub id.")
    source = str(Path(source).expanduser()) if looks_local else source
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise InputError(f"the model {model} cannot be loaded: {_first_line(error)}") from error
    auto = _auto_class(config, model)
    # The embedded default was released in bfloat16; its unpacked copy is kept in float32.
    dtype = dtype or default_dtype(torch.bfloat16 if model == defaults.MODEL else config.dtype)
    options = {**_quantisation(quantise, dtype), **_sharding(auto, config, shards)}
    if len(options) > 1:
        raise InputError("a quantised base cannot be sharded; leave out one of the two.")
    # Half a second: a bar would only be noise.
    hidden = model == defaults.MODEL and transformers_logging.is_progress_bar_enabled()
    if hidden:
        transformers_logging.disable_progress_bar()
    try:
        base = auto.from_pretrained(source, dtype=dtype, **options)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except ImportError as error:
        raise InputError(f"the model {model} cannot be quantised: install foreword[quantised].") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"the model {model} cannot be loaded: {_first_line(error)}") from error
    finally:
        if hidden:
            transformers_logging.enable_progress_bar()
    if not options and torch.accelerator.is_available():
        base.to(torch.accelerator.current_accelerator())
    base.config._name_or_path = model
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return base.eval(), tokenizer


def base_of(header: dict[str, Any]) -> tuple[PreTrainedModel, Any]:
    """The base that a saved prefix was trained on, as `prefix.json` tells it. Raises InputError as `load_base` does."""
    return load_base(header["base"]["id"], quantise=header["base"].get("quantisation"))


def _auto_class(config: Any, model: str) -> Any:
    if config.is_encoder_decoder and type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return AutoModelForSeq2SeqLM
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        return AutoModelForMaskedLM
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    raise InputError(f"{model} ({config.model_type}) is not a causal, masked or sequence-to-sequence language model.")


def _quantisation(quantise: str | dict[str, Any] | None, dtype: torch.dtype) -> dict[str, Any]:
    """What from_pretrained takes."""
    if quantise is None:
        return {}
    # Of every product of another precision it would say that 8 bits are computed in float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if isinstance(quantise, dict):
        return {"quantization_config": quantise}
    if quantise not in QUANTISED:
        raise InputError(f"a base cannot be quantised to {quantise!r}; choose {' or '.join(QUANTISED)}.")
    computed = {"bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")} if quantise == "4bit" else {}
    return {"quantization_config": {"quant_method": "bitsandbytes", **QUANTISED[quantise], **computed}}


def quantisation(base: PreTrainedModel) -> dict[str, Any] | None:
    """With what `quantise` a base like this one is loaded."""
    quantised = getattr(base.config, "quantization_config", None)
    return None if quantised is None else quantised if isinstance(quantised, dict) else quantised.to_dict()


def keep_unpacked(base: nn.Module) -> None:
    """Keep 4-bit weights as they were loaded.

    On a CPU with units for bfloat16, bitsandbytes packs a layer's weight anew, for good, when it first runs in
    evaluation mode. No gradient goes through a packed weight, its shape is another, and some sizes cannot be packed.
    """
    for module in base.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.state_dict()  # unpacks what a call before this one packed
            cast(Any, module).support_avx512bf16_for_cpu = False


def _sharding(auto: Any, config: Any, shards: int) -> dict[str, Any]:
    """What from_pretrained takes: a plan that names the layers of any family, beside the family's own."""
    if shards == 1:
        return {}
    if config.is_encoder_decoder:
        raise InputError("a base with an encoder and a decoder cannot be sharded; leave out --shard.")
    with torch.device("meta"):
        skeleton = auto.from_config(config)
    layers = set(skeleton._no_split_modules or ())
    numbered = [name for name, m in skeleton.named_modules() if type(m).__name__ in layers]
    plan = {re.sub(r"\.\d+(?=\.|$)", ".*", name): "free_full_weight" for name in numbered}
    return {"distributed_config": DistributedConfig(fsdp_size=shards, fsdp_plan=plan)}


def default_dtype(released: torch.dtype | None) -> torch.dtype:
    """bfloat16 for a base released in half precision, on machines with matrix units for it (elsewhere it is emulated,
    many times slower than float32); a base released in float32 stays what it is."""
    half = released in (torch.bfloat16, torch.float16)
    return torch.bfloat16 if half and machine_has_fast_bf16() else torch.float32


def machine_has_fast_bf16() -> bool:
    """Whether bfloat16 is faster than float32 here: of CPUs, on those with matrix units for it (AMX). With the dot
    products of AVX-512 alone a training step takes 1.3 to 1.5 times as long (docs/log.md), emulated many times."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_amx_tile_supported())


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
