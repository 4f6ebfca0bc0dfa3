"""foreword beside PEFT's prefix tuning and LoRA: the same base, rows, order, batch, steps, precision and seed.

Every file of benchmarks/experiments is one experiment: `defaults.json` changed by what it says. Its result goes to
benchmarks/results/compare and is made again only when the settings have changed. Kinds:

    step        seconds per training step, methods alternating A B A B in one process; medians and ratios
    memory      peak resident memory of training steps above the loaded base, each method in a process of its own
    size        MiB of a saved run, all of its files
    generation  tokens per second of greedy decoding behind a shared prefix, methods alternating
    mixed       the same with rows over several prefixes in one batch, against PEFT switching adapters
    accuracy    test accuracy after a budget of steps, over methods, learning rates and seeds

An experiment with a `capability` (AVX2, AVX512) runs on such a processor alone.

    python benchmarks/compare.py --data-folder FOLDER [--only step-news] [--threads 2] [--device cuda]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as foreword's command line has it: less memory for every method

import torch
from ag_news import commit, hardware
from methods import Batch, Method, classifier_on, make

from foreword.averaging import WeightAverage
from foreword.bases import default_dtype, load_base
from foreword.schemas import Row

HERE = Path(__file__).parent
TESTED = 64  # rows at once
Settings = dict[str, Any]


def experiments(only: str) -> Iterator[tuple[str, Settings]]:
    defaults = json.loads((HERE / "experiments" / "defaults.json").read_text())
    for path in sorted((HERE / "experiments").glob("*.json")):
        if path.stem != "defaults" and only in path.stem:
            yield path.stem, {**defaults, **json.loads(path.read_text())}


# ---- rows


def read(settings: Settings, split: str) -> list[dict[str, str]]:
    lines = (Path(settings["folder"]) / settings["data"] / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def names_of(settings: Settings) -> list[str]:
    return sorted({row["label"] for row in read(settings, "train")})


def batches(
    base: Any, tokenizer: Any, settings: Settings, rows: list[dict[str, str]], size: int | None = None
) -> list[Batch]:
    """Padded batches of rows in the order given, of `size` or else the step's; `row_tokens` joins texts so that every
    row is full."""
    labels = names_of(settings)
    classifier = classifier_on(base, tokenizer, labels, settings["max_length"], length=1)
    texts, tokens = [row["text"] for row in rows], settings["row_tokens"]
    if tokens:
        around = texts * (1 + tokens // 16)  # so that the last rows find enough to join
        texts = [" ".join(around[i : i + tokens // 16]) for i in range(len(texts))]
    encoded, _ = classifier.encode(texts)
    examples = [
        {"input_ids": ids, "labels": labels.index(row["label"])} for ids, row in zip(encoded, rows, strict=True)
    ]
    size = size or settings["batch_size"]
    found = [classifier.collate(examples[i : i + size]) for i in range(0, len(examples), size)]
    return [{key: tensor.to(base.device) for key, tensor in batch.items()} for batch in found]


def shuffled(settings: Settings, seed: int, count: int) -> list[dict[str, str]]:
    rows = read(settings, "train")
    return random.Random(seed).sample(rows, count)


def to_train_on(settings: Settings, seed: int) -> list[dict[str, str]]:
    """The rows of all steps in their order; of `rows` different ones (all, where that is None) epoch after epoch."""
    total = settings["batch_size"] * settings["steps"]
    own = shuffled(settings, seed, min(total, settings["rows"] or total))
    draw = random.Random(seed)
    epochs = [own, *(draw.sample(own, len(own)) for _ in range(total // len(own)))]
    return [row for epoch in epochs for row in epoch][:total]


# ---- kinds


def load(settings: Settings) -> tuple[Any, Any]:
    base, tokenizer = load_base(settings["model"], getattr(torch, precision(settings)))
    return base.to(settings["device"]), tokenizer


def precision(settings: Settings) -> str:
    """Of all methods; `auto` is foreword's own choice for this machine."""
    given = settings["dtype"]
    return str(default_dtype(torch.bfloat16)).removeprefix("torch.") if given == "auto" else given


def one_step(
    method: Method, optimizer: torch.optim.Optimizer, batch: Batch, average: WeightAverage | None = None
) -> float:
    loss = method.loss(batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([*method.parameters(), *method.head_parameters()], 1.0)
    optimizer.step()
    if average is not None:
        average.update()
    optimizer.zero_grad()
    return float(loss)


def made(name: str, base: Any, tokenizer: Any, settings: Settings, **more: Any) -> Method:
    return make(name, base, tokenizer, names_of(settings), settings["max_length"], settings["length"], **more)


def step(settings: Settings) -> dict[str, Any]:
    base, tokenizer = load(settings)
    work = batches(base, tokenizer, settings, shuffled(settings, 0, settings["batch_size"] * (settings["rounds"] + 1)))
    methods = [made(name, base, tokenizer, settings) for name in settings["methods"]]
    optimizers = [torch.optim.AdamW(m.parameters() or [torch.zeros(1, requires_grad=True)], 1e-3) for m in methods]
    seconds: dict[str, list[float]] = {m.name: [] for m in methods}
    if settings["seen"]:  # as in a second epoch
        for method in methods:
            for batch in work:
                method.loss(batch)
    for i, batch in enumerate(work):
        for method, optimizer in zip(methods, optimizers, strict=True):
            took = timed(lambda m=method, o=optimizer, b=batch: one_step(m, o, b))  # type: ignore[misc]
            if i:  # the first round warms up
                seconds[method.name].append(took)
        say(f"round {i} of {settings['rounds']}")
    real = mean(int(b["attention_mask"].sum()) for b in work)
    padded = mean(b["attention_mask"].numel() for b in work)
    return {"tokens_per_batch": real, "tokens_padded": padded, **ratios(seconds)}


def ratios(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and the median over rounds of each method's time over the first method's in the same round."""
    first = next(iter(seconds.values()))
    over = {name: median(b / a for a, b in zip(first, each, strict=True)) for name, each in seconds.items()}
    return {"seconds": seconds, "median": {n: median(each) for n, each in seconds.items()}, "ratio": over}


def memory(settings: Settings) -> dict[str, Any]:
    """MiB that the peak of two training steps lies above the loaded base and the made method."""
    context = multiprocessing.get_context("spawn")
    found = {}
    for name in settings["methods"]:
        with context.Pool(1) as pool:
            found[name] = pool.apply(peak, (name, settings))
        say(f"{name}: {found[name]:.0f} MiB")
    return in_mib(found)


def in_mib(found: dict[str, float]) -> dict[str, Any]:
    """What each method takes, and over what the first one does."""
    first = next(iter(found.values()))
    return {"mib": found, "ratio": {name: value / first for name, value in found.items()}}


def peak(name: str, settings: Settings) -> float:
    torch.set_num_threads(settings["threads"])
    base, tokenizer = load(settings)
    work = batches(base, tokenizer, settings, shuffled(settings, 0, settings["batch_size"] * 2))
    method = made(name, base, tokenizer, settings)
    optimizer = torch.optim.AdamW(method.parameters(), 1e-3)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew from here
    before = status("VmRSS")
    for batch in work:
        one_step(method, optimizer, batch)
    return (status("VmHWM") - before) / 1024


def status(key: str) -> int:
    """KiB that the kernel reports of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def size(settings: Settings) -> dict[str, Any]:
    base, tokenizer = load(settings)
    found = {}
    for name in settings["methods"]:
        module: Any = made(name, base, tokenizer, settings).module
        with TemporaryDirectory() as folder:
            module.save_pretrained(folder)
            found[name] = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / 2**20
    return in_mib(found)


def prompts(tokenizer: Any, settings: Settings) -> Batch:
    rows = [row["text"] for row in read(settings, "test")[: settings["batch_size"]]]
    found = tokenizer(rows, return_tensors="pt", padding=True, padding_side="left", truncation=True, max_length=32)
    return {key: found[key] for key in ("input_ids", "attention_mask")}


def tokens(settings: Settings) -> dict[str, Any]:
    """Arguments of a greedy generation of a fixed number of tokens."""
    count = settings["new_tokens"]
    return {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}


def generation(settings: Settings) -> dict[str, Any]:
    base, tokenizer = load(settings)
    inputs, fixed = prompts(tokenizer, settings), tokens(settings)
    calls: dict[str, Callable[[], Any]] = {}
    for name in settings["methods"]:
        method = made(name, base, tokenizer, settings)
        method.module.eval()
        if name == "foreword":
            finished(method, ["served"])
        calls[name] = lambda m=method: m.generate(**inputs, **fixed)  # type: ignore[misc]
    return speeds(calls, settings)


def finished(method: Method, names: list[str]) -> None:
    """Put the prefix on the model by these names as it is when it comes from a file: keys and values, made once."""
    model: Any = method.module.model  # type: ignore[union-attr]
    for name in names:
        model.put(name, model.kv("prefix"), like="prefix")


def mixed(settings: Settings) -> dict[str, Any]:
    """16 rows over four prefixes: PEFT runs each adapter's rows by themselves, foreword one batch."""
    base, tokenizer = load(settings)
    inputs, fixed, count = prompts(tokenizer, settings), tokens(settings), settings["prefixes"]
    own = made("foreword", base, tokenizer, settings)
    model: Any = own.module.model  # type: ignore[union-attr]
    theirs = made("peft-text", base, tokenizer, settings).module.eval()
    finished(own, [f"p{i}" for i in range(count)])
    for i in range(1, count):
        theirs.add_adapter(f"p{i}", theirs.peft_config["default"])  # type: ignore[operator]
    names = [f"p{i}" for i in range(count)] * (settings["batch_size"] // count)

    def switching() -> None:
        for i in range(count):
            theirs.set_adapter("default" if i == 0 else f"p{i}")  # type: ignore[operator]
            theirs.generate(**{key: value[i::count] for key, value in inputs.items()}, **fixed)  # type: ignore[operator]

    def together() -> None:
        with torch.no_grad():
            model.generate(**inputs, **fixed, prefix=names)

    return speeds({"peft-text": switching, "foreword": together}, settings)


def speeds(calls: dict[str, Callable[[], Any]], settings: Settings) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(settings["rounds"] + 1):
        for name, call in calls.items():
            took = timed(call)
            if i:
                seconds[name].append(took)
        say(f"round {i} of {settings['rounds']}")
    made = settings["batch_size"] * settings["new_tokens"]
    found = ratios(seconds)
    return {
        **found,
        "tokens_per_second": {name: made / value for name, value in found["median"].items()},
        "speed": {name: 1 / value for name, value in found["ratio"].items()},
    }


def accuracy(settings: Settings) -> dict[str, Any]:
    """Test accuracy, over seeds, of every method at the learning rate that is best on the validation rows of the first
    seed (foreword: at its own default alone).

    A run is a file of its own beside the result, so that an experiment of hours can be stopped, and shared by several
    processes, each with its `--methods`.
    """
    base, tokenizer = load(settings)
    splits = {name: longest_first(settings, name) for name in ("validation", "test")}
    rows = {name: batches(base, tokenizer, settings, found, TESTED) for name, found in splits.items()}
    folder = HERE / "results" / "compare" / settings["name"]
    folder.mkdir(parents=True, exist_ok=True)
    runs = []

    def at(name: str, rate: float | None, seed: int, best: float) -> dict[str, Any]:
        path = folder / f"{name}-{'default' if rate is None else f'{rate:g}'}-{seed}.json"
        if not path.exists():
            run = trained(name, rate, seed, base, tokenizer, settings, rows, best)
            facts = {"commit": commit(), "hardware": hardware(), "dtype": precision(settings)}
            path.write_text(json.dumps({**run, **facts}, indent=1) + "\n")
            say(f"{name} at {run['learning_rate']:g}, seed {seed}: {run['validation']} {run['test']}")
        return json.loads(path.read_text())

    for name in settings["methods"]:
        rates = [None] if name.startswith("foreword") else settings["learning_rates"][name]
        first: list[dict[str, Any]] = []
        for rate in rates:
            first.append(at(name, rate, 0, max((run["validation"] for run in first), default=-1.0)))
        best = max(first, key=lambda run: run["validation"])
        rate = rates[first.index(best)]
        runs += [*first, *(at(name, rate, seed, -1.0) for seed in range(1, settings["seeds"]))]
    return {"runs": runs, "hardware": runs[0]["hardware"], "dtype": runs[0]["dtype"]}


def longest_first(settings: Settings, split: str) -> list[dict[str, str]]:
    count = settings["validation_rows"] if split == "validation" else None
    return sorted(read(settings, split)[:count], key=lambda row: -len(row["text"]))


def trained(
    name: str,
    rate: float | None,
    seed: int,
    base: Any,
    tokenizer: Any,
    settings: Settings,
    rows: dict[str, list[Batch]],
    best: float,
) -> dict[str, Any]:
    """One run: of the end and the steps of `validate_at` it keeps that with the best validation accuracy, of equal ones
    the later. That is tested where it is above `best`, and foreword after the steps of `test_at` too."""
    torch.manual_seed(seed)
    drawn = to_train_on(settings, seed)
    own = [Row(row["text"], row["label"]) for row in drawn]
    method = made(name, base, tokenizer, settings, rows=own, whole=False)
    rate = rate or method.learning_rate
    assert rate is not None
    work = batches(base, tokenizer, settings, drawn)
    groups: list[Any] = [{"params": method.parameters(), "lr": rate}]
    if method.head is not None:
        groups.append({"params": method.head_parameters(), "lr": settings["head_learning_rate"]})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    warm = max(1, round(settings["warmup_ratio"] * len(work)))
    ramp = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm, 1.0, warm)
    # foreword's default is a constant rate and averaged weights; the others' rate decays to nought.
    average = WeightAverage(method.module) if name.startswith("foreword") else None
    then: Any = (
        torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        if average is not None
        else torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, len(work) - warm))
    )
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [ramp, then], [warm])
    weights = [*method.parameters(), *method.head_parameters()]
    losses, test, validations = [], {}, {}
    tested = settings["test_at"] if average is not None else []
    validated = [*settings.get("validate_at", []), len(work)]  # no default, which would make every other result stale
    for i, batch in enumerate(work, 1):
        losses.append(one_step(method, optimizer, batch, average))
        schedule.step()
        if i % 10 == 0:
            say(f"{name} at {rate:g}, seed {seed}: step {i} of {len(work)}, loss {mean(losses[-10:]):.3f}")
        if i not in (*tested, *validated):
            continue
        with average.applied() if average is not None else nullcontext():
            if i in tested:
                test[str(i)] = score(method, rows["test"])
            if i in validated:
                validations[i] = score(method, rows["validation"])
                if validations[i] == max(validations.values()):
                    kept, state = i, [p.detach().clone() for p in weights]
    if validations[kept] > best and str(kept) not in test:
        with torch.no_grad():
            for parameter, value in zip(weights, state, strict=True):
                parameter.copy_(value)
        test[str(kept)] = score(method, rows["test"])
    return {
        "method": name,
        "learning_rate": rate,
        "seed": seed,
        "step": kept,
        "validation": validations[kept],
        "validations": validations,
        "test": test,
        "losses": losses,
        "parameters": sum(p.numel() for p in method.parameters()),
    }


@torch.no_grad()
def score(method: Method, test: list[Batch]) -> float:
    right = [int((method.logits(batch).argmax(-1) == batch["labels"]).sum()) for batch in test]
    return sum(right) / sum(len(batch["labels"]) for batch in test)


# ---- running


def timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def measured(asked: Settings, given: Settings) -> tuple[dict[str, Any], dict[str, Any]]:
    """What an experiment finds, and where it was found; `given` is what does not make its result stale."""
    began, at = time.monotonic(), commit()
    found = KINDS[asked["kind"]]({**asked, **given})
    return found, {
        "commit": at,
        "hardware": found.get("hardware") or hardware(),
        "torch": torch.__version__,
        "dtype": found.get("dtype") or precision(asked),
        "minutes": (time.monotonic() - began) / 60,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


KINDS = {f.__name__: f for f in (step, memory, size, generation, mixed, accuracy)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-folder", required=True, help="holds ag_news/train.jsonl and the like")
    parser.add_argument("--only", default="", help="only experiments whose name holds this")
    parser.add_argument("--methods", default="", help="accuracy: only these, with commas between; no result is written")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu", help="accuracy alone: cuda where there is one")
    parser.add_argument("--seeds", type=int, help="how many; with --methods")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name, settings in experiments(arguments.only):
        path = HERE / "results" / "compare" / f"{name}.json"
        unit = hardware()["capability"]
        if settings.get("capability", unit) != unit:
            say(f"{name}: is of a processor with {settings['capability']}, and this one has {unit}")
            continue
        asked = {**settings, "threads": arguments.threads}
        given = {"folder": arguments.data_folder, "name": name, "device": arguments.device}
        if arguments.methods:
            if settings["kind"] == "accuracy":
                own = {} if arguments.seeds is None else {"seeds": arguments.seeds}
                accuracy({**asked, **given, **own, "methods": arguments.methods.split(",")})
            continue
        if path.exists() and json.loads(path.read_text())["settings"] == asked:
            say(f"{name}: done before with the same settings")
            continue
        say(f"{name}:")
        found, facts = measured(asked, given)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"settings": asked, **found, **facts}, indent=1) + "\n")
        print(json.dumps({"experiment": name, **{k: v for k, v in found.items() if k not in ("seconds", "runs")}}))


if __name__ == "__main__":
    main()
