"""Small random models of every family in the suite, and the inputs that the tests feed them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import transformers as tf
from torch import Tensor
from transformers import PreTrainedModel

from foreword.forms import PrefixConfig
from foreword.model import PrefixModel

torch.set_num_threads(1)  # these models are too small to share out
VOCABULARY, WINDOW, LENGTH = 99, 4, 5
FORMS = ("direct", "projected", "mlp")
Kind = Literal["decoder", "encoder", "seq2seq"]
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,  # tied, greedy decoding repeats the last token for ever
}
IDS = {key: value for key, value in SIZES.items() if key.endswith("_id") or key.startswith(("vocab", "tie"))}
MIXED = ["sliding_attention", "full_attention"]


@dataclass(frozen=True)
class Family:
    """One model family: how its small config is made, what it is, and what the tests must know of it.

    windowed: some of its layers see a window of WINDOW tokens alone.
    routed: mixture of experts, whose choice of experts is a step function of the hidden states.
    tolerance: of gradients in float32; more where the model itself makes roundings grow (norms of small vectors).
    """

    name: str
    config: Callable[[], Any]
    kind: Kind = "decoder"
    windowed: bool = False
    routed: bool = False
    tolerance: float = 1e-5

    def __str__(self) -> str:
        return self.name


def _gemma4(shared: int = 0) -> Any:
    """Full layers with other heads and sizes than windowed ones; the last `shared` layers read earlier layers' keys."""
    return tf.Gemma4TextConfig(
        **{**SIZES, "num_hidden_layers": 2 + shared},
        num_key_value_heads=2,
        num_global_key_value_heads=1,
        attention_k_eq_v=not shared,
        num_kv_shared_layers=shared,
        head_dim=8,
        global_head_dim=16,
        sliding_window=WINDOW,
        layer_types=MIXED * (1 + shared // 2),
        hidden_size_per_layer_input=8 if shared else 0,
        vocab_size_per_layer_input=VOCABULARY,
    )


def _deepseek() -> Any:
    return tf.DeepseekV3Config(
        **SIZES,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
    )


def _bart() -> Any:
    layers = {f"{side}_layers": 2 for side in ("encoder", "decoder")}
    heads = {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
    widths = {f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")}
    positions = {"max_position_embeddings": 64, "decoder_start_token_id": 2, "forced_eos_token_id": None}
    return tf.BartConfig(d_model=32, **IDS, **layers, **heads, **widths, **positions)


def _windowed(cls: Any, **settings: Any) -> Any:
    return cls(**SIZES, sliding_window=WINDOW, layer_types=MIXED, **settings)


ALL = [
    Family("llama", lambda: tf.LlamaConfig(**SIZES, num_key_value_heads=2)),
    Family("llama-mqa", lambda: tf.LlamaConfig(**SIZES, num_key_value_heads=1)),
    Family(
        "mistral",
        lambda: tf.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=WINDOW, head_dim=8),
        windowed=True,
    ),
    Family("qwen3", lambda: tf.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16)),
    Family(
        "gemma3",
        lambda: _windowed(tf.Gemma3TextConfig, num_key_value_heads=1, head_dim=16),
        windowed=True,
    ),
    Family(
        "gemma2",
        lambda: _windowed(
            tf.Gemma2Config,
            num_key_value_heads=2,
            head_dim=8,
            query_pre_attn_scalar=8,
            attn_logit_softcapping=2.0,
        ),
        windowed=True,
    ),
    Family("gemma4", _gemma4, windowed=True),
    Family("gemma4-shared", lambda: _gemma4(shared=2), windowed=True, tolerance=1e-4),
    Family("phi3", lambda: tf.Phi3Config(**SIZES, num_key_value_heads=2)),
    Family("gpt2", lambda: tf.GPT2Config(**IDS, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    Family("gpt-neox", lambda: tf.GPTNeoXConfig(**SIZES)),
    Family(
        "opt",
        lambda: tf.OPTConfig(
            **IDS,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
        ),
    ),
    Family(
        "mixtral",
        lambda: tf.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4),
        routed=True,
    ),
    Family(
        "qwen3-moe",
        lambda: tf.Qwen3MoeConfig(
            **SIZES,
            num_key_value_heads=2,
            head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
        ),
        routed=True,
    ),
    Family(
        "gpt-oss",
        lambda: _windowed(tf.GptOssConfig, num_key_value_heads=2, head_dim=8, num_local_experts=4),
        windowed=True,
        routed=True,
    ),
    Family("deepseek-v3", _deepseek, routed=True),
    Family("bert", lambda: tf.BertConfig(**SIZES), "encoder"),
    Family("roberta", lambda: tf.RobertaConfig(**{**SIZES, "pad_token_id": 1, "bos_token_id": 0}), "encoder"),
    Family(
        "distilbert",
        lambda: tf.DistilBertConfig(**IDS, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=64),
        "encoder",
    ),
    Family(
        "modernbert",
        lambda: tf.ModernBertConfig(
            **SIZES,
            cls_token_id=1,
            sep_token_id=2,
            local_attention=2 * WINDOW,
            global_attn_every_n_layers=2,
        ),
        "encoder",
        windowed=True,
    ),
    Family("bart", _bart, "seq2seq"),
    Family(
        "t5",
        lambda: tf.T5Config(
            **{k: v for k, v in IDS.items() if k != "bos_token_id"},
            d_model=32,
            d_kv=16,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        ),
        "seq2seq",
    ),
]
BY_NAME = {family.name: family for family in ALL}
DECODERS = [family for family in ALL if family.kind == "decoder"]
GENERATORS = [family for family in ALL if family.kind != "encoder"]
ENCODERS = [family for family in ALL if family.kind == "encoder"]
AUTO = {
    "decoder": tf.AutoModelForCausalLM,
    "encoder": tf.AutoModelForMaskedLM,
    "seq2seq": tf.AutoModelForSeq2SeqLM,
}


@cache
def base(name: str) -> PreTrainedModel:
    """The family's base, shared by the whole run: never trained, never left in training mode.

    The caller's random state is left alone: a test must draw the same numbers whether or not another made the base.
    """
    with torch.random.fork_rng():
        return _made(name)


def _made(name: str) -> PreTrainedModel:
    family = BY_NAME[name]
    torch.manual_seed(sum(name.encode()))
    model = AUTO[family.kind].from_config(family.config()).eval().float()
    for key, parameter in model.named_parameters():
        _scale(parameter, 0.4 if key.endswith(".q.weight") else 1.0)  # T5 does not scale its scores
    model.tie_weights()
    if family.kind != "encoder":
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


@torch.no_grad()
def _scale(parameter: Tensor, gain: float) -> None:
    """Weights large enough that attention is far from uniform; biases and norms that are not all alike."""
    if parameter.dim() > 1:
        parameter.normal_(std=gain * parameter.shape[-1] ** -0.5)
    else:
        parameter.add_(torch.randn_like(parameter) * 0.2)


def fresh(name: str) -> PreTrainedModel:
    """A copy of the base that a test may change."""
    return copy.deepcopy(base(name))


def wrapped(name: str, form: str | None = "direct", own: bool = False, **settings: Any) -> PrefixModel:
    """A PrefixModel over the shared base (over its `own` copy where asked) with one prefix `p` that has moved."""
    model = PrefixModel(fresh(name) if own else base(name), kernel=settings.pop("kernel", "auto"))
    if form is not None:
        add(model, "p", form, **settings)
    return model


def add(model: PrefixModel, name: str, form: str = "direct", moved: bool = True, **settings: Any) -> None:
    """Add a prefix; `moved` puts noise on its parameters, so that no test passes at the start alone."""
    added = model.add(name, PrefixConfig(form=form, **{"length": LENGTH, "mlp_size": 24, **settings}))
    generator = torch.Generator().manual_seed(len(model.forms))
    if moved:
        with torch.no_grad():
            for parameter in added.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def text(rows: int = 3, length: int = 7, seed: int = 1) -> Tensor:
    """Token ids `[rows, length]`, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCABULARY, (rows, length), generator=generator)


def padded(lengths: list[int], side: str, pad: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and mask of rows of these lengths; row r holds the first tokens of row r of `text`, whatever the side."""
    longest = max(lengths)
    ids = torch.full((len(lengths), longest), pad)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(longest - length, longest)
        ids[row, place] = text(len(lengths), longest)[row, :length]
        mask[row, place] = 1
    return ids, mask


def inputs(family: Family, lengths: list[int] | None = None, side: str = "right") -> dict[str, Tensor]:
    """A batch as the family's forward takes it; an encoder-decoder gets decoder tokens too."""
    ids, mask = padded(lengths or [7, 7, 7], side, base(family.name).config.pad_token_id)
    batch = {"input_ids": ids, "attention_mask": mask}
    if family.kind == "seq2seq":
        batch["decoder_input_ids"] = text(len(ids), 5, seed=2)
    return batch


def real(family: Family, batch: dict[str, Tensor], logits: Tensor) -> Tensor:
    """The logits of real tokens `[n, V]` (an encoder-decoder's decoder tokens are all real)."""
    return logits.flatten(0, 1) if family.kind == "seq2seq" else logits[batch["attention_mask"].bool()]


def off_by(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def parameters(model: PrefixModel, name: str = "p") -> dict[str, Tensor]:
    return dict(model.forms[name].named_parameters())


def flat_gradient(model: PrefixModel, name: str = "p") -> Tensor:
    """All gradients of a form in one vector."""
    return torch.cat([p.grad.flatten() for p in model.forms[name].parameters() if p.grad is not None])
