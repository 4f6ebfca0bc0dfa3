"""The memory of one training step on paper, checked against what is measured on SmolLM2, and worked out for 7B and 70B.

    python benchmarks/memory_recipe.py

On paper, per process, for a Llama of L layers, width d, H heads and H_kv key heads of size h, and an MLP of width m:

- weights: parameters x bytes; in 4 bits those of the layers take 0.516 bytes, and the embeddings stay. Sharded: that
  over the processes, and the layer that runs, the next one, and the embeddings are whole as well.
- prefix: 2 L H_kv h P numbers, of each the start, the change, its gradient, two moments of AdamW, and the key or value
  made of them with its gradient, in float32.
- activations: frozen weights need no gradient, so a linear layer keeps nothing. What is kept of each token and layer is
  what is not linear: the queries, keys, values and outputs of attention, the gate and the up projection of the MLP (the
  activation is computed again), and the input of both norms in float32. With checkpointing a layer keeps its input
  alone, and one layer at a time what it would keep otherwise, and its activation.
- work: what one layer makes and drops, at its largest three tensors of the MLP's width.

What a loss over a vocabulary adds is bounded, and not counted: `generate` makes 64 MiB of logits at a time.
Measured is the most that PyTorch's allocator has given out at a time in a step, above the loaded base, on a CPU in
float32: what `torch.cuda.max_memory_allocated` tells on a GPU.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

import torch
from compare import commit, hardware
from torch.profiler import ProfilerActivity, profile

import foreword

MIB = 2**20
RESULTS = Path(__file__).parent / "results" / "memory_recipe.json"


@dataclass(frozen=True)
class Shape:
    """A Llama: layers, width, heads, key heads, size of a head, width of the MLP, vocabulary, tied embeddings."""

    name: str
    layers: int
    width: int
    heads: int
    key_heads: int
    head: int
    mlp: int
    vocabulary: int
    tied: bool = False

    @property
    def of_a_layer(self) -> int:
        attention = self.width * self.head * (2 * self.heads + 2 * self.key_heads)
        return attention + 3 * self.width * self.mlp + 2 * self.width

    @property
    def embeddings(self) -> int:
        return self.vocabulary * self.width * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        return self.layers * self.of_a_layer + self.embeddings + self.width


SMOL = Shape("SmolLM2-135M", 30, 576, 9, 3, 64, 1536, 49152, tied=True)
LARGE = (
    Shape("Mistral-7B", 32, 4096, 32, 8, 128, 14336, 32768),
    Shape("Llama-3-70B", 80, 8192, 64, 8, 128, 28672, 128256),
)


@dataclass(frozen=True)
class Step:
    """A training step of one process: its rows x tokens, the prefix's length, bytes of a number and of a weight of the
    layers (by default as many), and over how many processes the base is sharded."""

    rows: int
    tokens: int
    length: int
    checkpointing: bool
    bytes: float = 2
    processes: int = 1
    weight_bytes: float | None = None


def on_paper(shape: Shape, step: Step) -> dict[str, float]:
    """MiB by part."""
    size, count = step.bytes, step.rows * step.tokens
    weight = step.weight_bytes or size
    whole = shape.layers * shape.of_a_layer * weight + (shape.embeddings + shape.width) * size
    gathered = (2 * shape.of_a_layer * weight + shape.embeddings * size) if step.processes > 1 else 0
    weights = whole / step.processes + gathered
    prefix = 2 * shape.layers * shape.key_heads * shape.head * step.length * 7 * 4
    attention = 2 * (shape.heads + shape.key_heads) * shape.head
    kept = count * (size * (attention + 2 * shape.mlp) + 4 * 2 * shape.width)
    entering = count * size * shape.width
    activations = (
        shape.layers * entering + kept + count * size * shape.mlp if step.checkpointing else shape.layers * kept
    )
    work = count * 3 * shape.mlp * size
    parts = {"weights": weights, "prefix": prefix, "activations": activations, "work": work}
    return {name: value / MIB for name, value in {**parts, "total": sum(parts.values())}.items()}


def measured(step: Step) -> dict[str, float]:
    """MiB of the weights, and of the peak of a step above the loaded base."""
    base, tokenizer = foreword.load_base("smollm2-135m-instruct", torch.float32)
    model = foreword.PrefixModel(base, tokenizer)
    model.add("prefix", length=step.length, start="vocabulary")
    model.train()  # transformers checkpoints in training mode alone
    if step.checkpointing:
        model.gradient_checkpointing_enable()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-3)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes its moments
    optimizer.zero_grad()
    moments = [x for state in optimizer.state.values() for x in state.values()]
    held = sum(x.nbytes for x in [*trained, *model.form("prefix").buffers(), *moments])
    ids = torch.randint(100, 40_000, (step.rows, step.tokens), generator=torch.Generator().manual_seed(0))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(input_ids=ids, logits_to_keep=1).logits.float().logsumexp(-1).sum().backward()
        optimizer.step()
    events = profiler.profiler.kineto_results.events()
    allocated = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peak = max(accumulate(change for _, change in allocated))
    return {"weights": base.get_memory_footprint() / MIB, "step": (peak + held) / MIB}


def checked(step: Step) -> dict[str, object]:
    """Paper beside measurement; the weights lie below the measured peak."""
    paper = on_paper(SMOL, step)
    found = measured(step)
    expected = paper["total"] - paper["weights"]
    row = {**asdict(step), "paper": paper, "measured": found, "step_paper_over_measured": expected / found["step"]}
    row["weights_paper_over_measured"] = paper["weights"] / found["weights"]
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    checks = [
        checked(Step(rows, tokens, length, checkpointing, bytes=4))
        for rows, tokens, length in ((4, 128, 16), (1, 384, 128))
        for checkpointing in (False, True)
    ]
    shapes = [{**asdict(shape), "parameters": shape.parameters} for shape in (SMOL, *LARGE)]
    facts = {"commit": commit(), "hardware": hardware(), "torch": torch.__version__}
    record = {"shapes": shapes, "checks": checks, "large": large(), **facts}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


def large() -> list[dict[str, object]]:
    """Steps of the large models on paper."""
    rows = []
    for shape in LARGE:
        for processes in (1, 2, 8):
            for checkpointing in (False, True):
                step = Step(rows=1, tokens=2048, length=64, checkpointing=checkpointing, processes=processes)
                rows.append({"model": shape.name, **asdict(step), "paper": on_paper(shape, step)})
        four_bits = Step(rows=1, tokens=2048, length=64, checkpointing=True, weight_bytes=0.5 + 0.127 / 8)
        rows.append({"model": shape.name, **asdict(four_bits), "paper": on_paper(shape, four_bits)})
    return rows


if __name__ == "__main__":
    main()
