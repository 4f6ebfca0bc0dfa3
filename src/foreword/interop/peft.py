"""PEFT both ways: its prefix-tuning checkpoints and cartridges, written and read. PEFT itself is not needed.

A checkpoint is `adapter_config.json` and one tensor `prompt_embeddings` `[P, 2 L H_kv d]`: for each virtual token,
layer by layer, the keys of all heads and then the values, as `PeftModel.get_prompt` splits them (PEFT 0.21).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import files
from ..bases import load_base
from ..errors import InputError
from ..forms import Finished, PrefixConfig
from ..kv import KVPrefix, SiteKV
from ..model import PrefixModel
from .carried import check_carried, check_output, left_behind

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KINDS = ("PREFIX_TUNING", "CARTRIDGE")
# PEFT lays these out in another way, for caches that transformers no longer has.
OTHER_LAYOUT = ("GPTBigCode", "Bloom")


def export(directory: str | Path, output: str | Path) -> list[str]:
    """Write a saved prefix as a checkpoint that `PeftModel.from_pretrained` loads; returns what it does not carry.

    Raises InputError when PEFT cannot hold the prefix exactly, or `output` holds something else.
    """
    header, tensors = files.read(directory)
    check_carried(header, "PEFT")
    _check_layout(header["base"]["model"])
    kv = files.kv_from(header, tensors)
    shapes = sorted({tuple(t.shape[1::2]) for site in kv.sites.values() for t in site})
    if len(shapes) > 1:
        raise InputError(
            f"PEFT cannot carry this prefix: its layers differ in heads and head size ({shapes}), and PEFT has one."
        )
    check_output(output, CONFIG)
    ((heads, size),) = shapes
    with files.replacing(output) as beside:
        save_file({"prompt_embeddings": flatten(kv)}, beside / WEIGHTS)
        config = _config(header["base"]["id"], kv.length, len(kv.sites), heads, size)
        (beside / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return left_behind(header, tensors)


def _config(base: str, length: int, layers: int, heads: int, size: int) -> dict[str, Any]:
    return {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "num_virtual_tokens": length,
        "num_layers": layers,
        "num_attention_heads": heads,
        "token_dim": heads * size,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
        "encoder_hidden_size": heads * size,
    }


def flatten(kv: KVPrefix) -> Tensor:
    """`[P, 2 L H_kv d]`, float32."""
    parts = torch.stack([tensor[0].float() for site in kv.sites.values() for tensor in site])  # [2 L, H_kv, P, d]
    return parts.permute(2, 0, 1, 3).flatten(1).contiguous()


def unflatten(flat: Tensor, names: list[str], heads: int) -> KVPrefix:
    """The inverse of `flatten`, for the sites `names` in order."""
    parts = flat.float().view(len(flat), 2 * len(names), heads, -1).permute(1, 2, 0, 3)[:, None].contiguous()
    return KVPrefix({name: SiteKV(parts[2 * i], parts[2 * i + 1]) for i, name in enumerate(names)})


def import_(directory: str | Path, output: str | Path, base: str | None = None) -> list[str]:
    """Save a PEFT prefix-tuning or cartridge checkpoint as a prefix; returns what it leaves behind.

    base: the model it was trained for; by default the one that the checkpoint names.
    Raises InputError when the checkpoint is damaged, of another method or does not fit the base.
    """
    config, tensors = _read(directory)
    name = base or config.get("base_model_name_or_path")
    if not name:
        raise InputError(f"{directory} does not name the model it was trained for; give it with --model.")
    check_output(output, files.HEADER)
    model = PrefixModel(*load_base(name))
    put(model, config, tensors, Path(directory))
    model.save_pretrained(output)
    extra = sorted(key for key in tensors if key.startswith("base_model."))
    return [f"Trained modules beside the prefix are not carried: {', '.join(extra)}."] if extra else []


def put(model: PrefixModel, config: dict[str, Any], tensors: dict[str, Tensor], directory: Path) -> None:
    """Add the checkpoint's prefix to the model's bank as `peft` and activate it."""
    _check_layout(type(model.base).__name__)
    if {site.kind for site in model.sites} != {"decoder"} or not model.can_move_positions:
        raise InputError(
            f"{directory} cannot be imported: {model.base_id} is no decoder whose text can follow a cache."
        )
    if getattr(model.config.get_text_config(), "num_kv_shared_layers", 0):
        raise InputError(f"{directory} cannot be imported: layers of {model.base_id} share keys and values.")
    flat, heads, sites = prompt_embeddings(tensors, directory), model.sites[0].kv_heads, model.sites
    shapes = {(site.kv_heads, size) for site in sites for size in (site.key_size, site.value_size)}
    width = sum(site.kv_heads * (site.key_size + site.value_size) for site in sites)
    if config.get("num_attention_heads") != heads or len(shapes) > 1 or flat.shape[1] != width:
        raise InputError(
            f"{directory} does not fit {model.base_id}: it holds {flat.shape[1]} numbers per token for "
            f"{config.get('num_attention_heads')} heads, and the base's {len(sites)} layers take {width}, heads and "
            f"head sizes {sorted(shapes)}."
        )
    kv = unflatten(flat, [site.name for site in sites], heads)
    slides = any(site.window for site in sites)
    model.forms["peft"] = Finished(kv.to(model.device))
    model.configs["peft"] = PrefixConfig(
        length=kv.length, positions="after", window="slides" if slides else "visible", frozen_tokens=0
    )
    model.headers["peft"] = {"prefix": {"parameters": kv.numel()}}
    model.active = "peft"


def prompt_embeddings(tensors: dict[str, Tensor], directory: Path) -> Tensor:
    """`[P, 2 L H_kv d]` of a checkpoint: as PEFT saves it, or from the parameters of its encoder, whose network
    W_2 tanh(W_1 E + b_1) + b_2 (Li & Liang 2021, section 4.3) is run once. Raises InputError without either."""
    if "prompt_embeddings" in tensors:
        return tensors["prompt_embeddings"]
    own = {k.split("prompt_encoder.")[-1].removeprefix("default."): t.float() for k, t in tensors.items()}
    if "transform.2.weight" in own:
        hidden = torch.tanh(own["embedding.weight"] @ own["transform.0.weight"].T + own["transform.0.bias"])
        return hidden @ own["transform.2.weight"].T + own["transform.2.bias"]
    if "trainable_embedding" in own:
        frozen = [own["frozen_embedding"]] if "frozen_embedding" in own else []
        return torch.cat([*frozen, own["trainable_embedding"]])
    if "embedding.weight" in own:
        return own["embedding.weight"]
    raise InputError(f"{directory / WEIGHTS} holds no prefix: it has {', '.join(sorted(tensors)[:3]) or 'nothing'}.")


def _read(directory: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder = Path(directory)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{directory} is no PEFT checkpoint: {CONFIG} is missing.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{folder / CONFIG} is damaged: it is not valid JSON ({error}).") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind not in KINDS:
        raise InputError(f"{directory} is a checkpoint of {kind}; prefixes come from {' and '.join(KINDS)}.")
    if config.get("num_transformer_submodules") == 2 or config.get("task_type") == "SEQ_2_SEQ_LM":
        raise InputError(
            f"{directory} cannot be imported: it is for an encoder-decoder, where PEFT leaves half of the prefix "
            "unused and gives the other half to two layers each; train it again."
        )
    if not (folder / WEIGHTS).is_file():
        raise InputError(
            f"{folder / WEIGHTS} is missing; foreword reads no pickle, so load a .bin checkpoint with PEFT and save it."
        )
    try:
        return config, load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise InputError(f"{folder / WEIGHTS} is damaged: {error}.") from error


def _check_layout(model: str) -> None:
    if model.startswith(OTHER_LAYOUT):
        raise InputError(f"PEFT's layout of prefixes for {model} is made for caches that transformers no longer has.")
