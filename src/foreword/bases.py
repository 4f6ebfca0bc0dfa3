"""Loading a base: a hub id, a folder, or the embedded default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
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
from transformers.utils import logging as transformers_logging

from . import defaults
from .errors import InputError


def load_base(model: str, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, Any]:
    """A base with its language-model head, in evaluation mode, and its tokenizer with a pad token.

    dtype: of the weights; by default bfloat16 where the machine computes it fast, else float32.
    Raises InputError when the folder is missing, the hub cannot be reached, or it is not a language model.
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
    if model == defaults.MODEL:  # half a second: a bar would only be noise
        transformers_logging.disable_progress_bar()
    try:
        base = auto.from_pretrained(source, dtype=dtype or default_dtype())
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"the model {model} cannot be loaded: {_first_line(error)}") from error
    finally:
        if model == defaults.MODEL:
            transformers_logging.enable_progress_bar()
    base.config._name_or_path = model
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return base.eval(), tokenizer


def _auto_class(config: Any, model: str) -> Any:
    if config.is_encoder_decoder and type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return AutoModelForSeq2SeqLM
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        return AutoModelForMaskedLM
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    raise InputError(f"{model} ({config.model_type}) is not a causal, masked or sequence-to-sequence language model.")


def default_dtype() -> torch.dtype:
    """bfloat16 on machines with matrix units for it; elsewhere it is emulated, many times slower than float32."""
    return torch.bfloat16 if machine_has_fast_bf16() else torch.float32


def machine_has_fast_bf16() -> bool:
    """Whether bfloat16 runs in hardware here; where a CPU emulates it, it is far slower than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, check)()) for check in checks if hasattr(torch.cpu, check))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
