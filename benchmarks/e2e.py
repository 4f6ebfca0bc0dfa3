"""E2E as Li and Liang (2021) set it up, scaled to a small machine: foreword, PEFT's prefix tuning and LoRA on SmolLM2.

One epoch over the same pairs in the same order, 4,000 at a rate that decays to nought, by foreword's trainer for all;
then beam search over the 630 tables of the test set, and the figures of `e2e_metrics.py`. foreword runs with its
defaults otherwise; PEFT's methods at each of three learning rates, of which the one counts that has the lowest loss on
200 validation tables. One JSON file per run under benchmarks/results/e2e; a run whose file is there is not repeated. A
run of seed 0 is tested where its loss is below that of the settings before it. `tables.py` makes the table. With
`--no-figures` the texts are kept, and their figures, which need Java, left to the next call without it.

    python benchmarks/e2e.py --data-folder FOLDER [--only lora] [--threads 2]
    python benchmarks/e2e.py --data-folder FOLDER --train-rows 64 --test-rows 8 --results /tmp/e2e    # does it run?

A quarter of the pairs, where foreword's constant rate is its default, and PEFT's methods try it too at their best rate:

    Q="python benchmarks/e2e.py --data-folder FOLDER --train-rows 1000 --results benchmarks/results/e2e_1000"
    $Q --only foreword --schedules constant_with_warmup --seeds 2
    $Q --only peft-text --rates 3e-2 1e-1 1e-2 && $Q --only peft-text --rates 3e-2 --schedules constant_with_warmup
    $Q --only lora --rates 1e-2 3e-3 3e-2 && $Q --only lora --rates 1e-2 --schedules cosine constant_with_warmup
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from ag_news import commit, write
from e2e_metrics import e2e_metrics, missing
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_text
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import foreword
from foreword.generate import continued
from foreword.schemas import Row
from foreword.tasks.generate import PrefixGenerator
from foreword.tasks.output import output_layer
from foreword.tasks.task import IGNORED
from foreword.train import NAME, TrainConfig, build, encoded, load_rows, run_arguments, train
from foreword.trainer import PrefixTrainer

RESULTS = Path(__file__).parent / "results" / "e2e"
BEAMS, NEW_TOKENS, ROWS, COMPLETED = 5, 64, 16, 64
RATES: dict[str, tuple[float | None, ...]] = {
    "foreword": (None,),
    "peft-text": (1e-2, 3e-3, 3e-2),
    "lora": (3e-3, 1e-3, 1e-2),
}
Setting = tuple[float | None, str]  # learning rate, schedule


def config(arguments: argparse.Namespace, output: Path, setting: Setting, seed: int) -> TrainConfig:
    """The budget and the rate; all else by default. Its own test is of one row: the tables are completed afterwards."""
    rate, schedule = setting
    return TrainConfig(
        output,
        data=str(arguments.data_folder / "e2e"),
        task="generate",
        train_rows=arguments.train_rows,
        validation_rows=200,
        test_rows=1,
        max_new_tokens=NEW_TOKENS,
        beams=BEAMS,
        batch_size=ROWS,
        learning_rate=rate,
        schedule=schedule,
        zero_shot=False,
        seed=seed,
    )


@dataclass
class Trained:
    """What a run found, and how it completes prompts."""

    facts: dict[str, Any]
    complete: Callable[[Sequence[Row]], list[str]]


def with_foreword(given: TrainConfig) -> Trained:
    summary = train(given, say=say).summary
    facts = {key: summary[key] for key in ("validation", "learning_rate", "best_step", "parameters", "losses")}
    task = foreword.load(given.output)

    def complete(rows: Sequence[Row]) -> list[str]:
        results = task.predict([row.text for row in rows], COMPLETED, progress=progress)
        return [result["completion"] for result in results]

    return Trained({**facts, "seconds": summary["seconds"]["training"]}, complete)


def with_peft(method: str, given: TrainConfig) -> Trained:
    data = load_rows(given)
    task = build(given, data)
    adapted = Adapted(method, task)
    (rows, _), (validation, _) = encoded(task, data.train), encoded(task, data.validation)
    args = run_arguments(given, task.model, -(-len(rows) // given.batch_size), given.output / "training")
    trainer = PrefixTrainer(
        adapted,  # type: ignore[arg-type]
        args,
        train_dataset=rows,
        eval_dataset=validation,
        data_collator=task.collate,
    )
    trainer.train()
    facts = {
        "validation": trainer.state.best_metric,
        "learning_rate": given.learning_rate,
        "best_step": trainer.state.best_global_step,
        "parameters": sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        "losses": [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry],
        "seconds": round(trainer.seconds, 1),
    }
    return Trained(facts, adapted.complete)


class Adapted(nn.Module):
    """A base with what PEFT trains, as foreword's trainer takes a model; rows are made to inputs by foreword's task."""

    head = compute_metrics = None

    def __init__(self, method: str, task: PrefixGenerator) -> None:
        super().__init__()
        self.base, self.tokenizer = foreword.load_base(task.model.base_id)
        self.module = peft_model(method, self.base, self.tokenizer, task)
        self.collate, self.items, self._encode = task.collate, task.items, task.examples

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The mean cross-entropy of the completions' tokens; logits of other positions are not computed."""
        wanted = labels[:, 1:] != IGNORED
        with output_layer(self.base, lambda hidden: hidden):
            hidden = self.module(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
        logits = self.base.get_output_embeddings()(hidden[wanted])
        return {"loss": cross_entropy(logits.float(), labels[:, 1:][wanted])}

    @torch.no_grad()
    def complete(self, rows: Sequence[Row]) -> list[str]:
        self.eval()
        examples, _ = self._encode(rows)
        prompts = [example["input_ids"][: example["labels"].count(IGNORED)] for example in examples]
        texts = continued(
            self,  # type: ignore[arg-type]
            prompts,
            max_new_tokens=NEW_TOKENS,
            beams=BEAMS,
            batch_size=COMPLETED,
            progress=progress,
        )
        return [text.strip() for text in texts]

    # What `continued` asks of a model, so that all methods complete the same batches, padded alike.

    kind = "decoder"

    @property
    def device(self) -> torch.device:
        return self.base.device

    def text_limit(self) -> None:
        return None

    def generate(self, prefix: Any, **given: Any) -> Tensor:
        return self.module.generate(**given)


def peft_model(method: str, base: Any, tokenizer: Any, task: PrefixGenerator) -> Any:
    """LoRA, by default on queries and values; or as many keys and values as foreword's, from the same text."""
    if method == "lora":
        return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8))
    length, text = task.model.form(NAME).length, task.model.configs[NAME].instruction
    model = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length))
    initialize_kv_prefix_from_text(model, tokenizer, text=text, num_virtual_tokens=length, use_chat_template=False)
    return model


# ---- running


def run(path: Path, method: str, setting: Setting, seed: int, best: float, arguments: argparse.Namespace) -> None:
    """Train, and test where the validation loss is below `best`."""
    began_at = commit()
    with tempfile.TemporaryDirectory() as folder:
        given = config(arguments, Path(folder) / "run", setting, seed)
        trained = with_foreword(given) if method == "foreword" else with_peft(method, given)
        found = {"experiment": {"method": method, "seed": seed, "schedule": given.schedule}, **trained.facts}
        say(f"{path.stem}: validation loss {trained.facts['validation']:.4f}")
        if trained.facts["validation"] < best:
            began = time.monotonic()
            found["texts"] = trained.complete(test_rows(given, arguments))
            found["generation_seconds"] = round(time.monotonic() - began, 1)
    write(path, found, began_at)
    print(json.dumps({"run": path.stem, "validation": found["validation"]}), flush=True)


def test_rows(given: TrainConfig, arguments: argparse.Namespace) -> Sequence[Row]:
    return load_rows(replace(given, test_rows=arguments.test_rows)).test


def add_figures(path: Path, arguments: argparse.Namespace) -> None:
    """The figures of a run's texts, into its file."""
    found = json.loads(path.read_text())
    if "texts" not in found or "test" in found:
        return
    rows = test_rows(config(arguments, Path("unused"), (None, "constant_with_warmup"), 0), arguments)
    references = [(row.label,) if isinstance(row.label, str) else row.label for row in rows]
    found["test"] = e2e_metrics(found["texts"], references)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({"run": path.stem, **found["test"]}), flush=True)


def method_runs(method: str, arguments: argparse.Namespace) -> None:
    """Every setting with seed 0, then the best with the other seeds."""

    def at(setting: Setting, seed: int, best: float) -> float:
        rate, schedule = setting
        named = "default" if rate is None else f"{rate:g}"
        path = arguments.results / f"{method}-{named}-{schedule}-{seed}.json"
        if not path.exists():
            run(path, method, setting, seed, best, arguments)
        if not arguments.no_figures:
            add_figures(path, arguments)
        return json.loads(path.read_text())["validation"]

    losses: dict[Setting, float] = {}
    for setting in product(arguments.rates or RATES[method], arguments.schedules):
        losses[setting] = at(setting, 0, min(losses.values(), default=float("inf")))
    for seed in range(1, arguments.seeds):
        at(min(losses, key=losses.__getitem__), seed, float("inf"))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def progress(done: int, total: int) -> None:
    say(f"completed {done} of {total}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-folder", type=Path, required=True, help="holds e2e/train.jsonl and the like")
    parser.add_argument("--only", default="", help="only methods whose name holds this")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--train-rows", type=int, default=4000)
    parser.add_argument("--test-rows", type=int, default=None, help="all 630 by default")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no-figures", action="store_true")
    parser.add_argument("--rates", type=float, nargs="*", default=[], help="in place of the method's own")
    parser.add_argument("--schedules", nargs="*", default=["cosine"], help="each with every rate")
    arguments = parser.parse_args()
    if (lacks := missing()) and not arguments.no_figures:
        parser.error(lacks)
    torch.set_num_threads(arguments.threads)
    for method in RATES:
        if arguments.only in method:
            method_runs(method, arguments)


if __name__ == "__main__":
    main()
