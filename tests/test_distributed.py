"""Two processes over gloo, started by torchrun and accelerate: the same prefix as one process, and clean ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from foreword import checkpoints
from foreword.config import TrainConfig
from foreword.forms import PrefixConfig
from foreword.train import build, train

HERE = Path(__file__).parent
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
Tensors = dict[str, torch.Tensor]


def settings(output: Path, model: Path, data: Path) -> TrainConfig:
    """60 rows in batches of 7: the last has 4, and a validation batch of one row leaves a process without any."""
    return TrainConfig(
        output=output,
        model=str(model),
        data=str(data),
        train_rows=60,
        batch_size=7,
        prefix=PrefixConfig(form="direct", length=6),
        max_length=40,
        learning_rate=0.05,
        save_steps=3,
        dtype="float32",
    )


@torch.no_grad()
def start_of(config: TrainConfig) -> Tensors:
    from foreword.files import kv_tensors
    from foreword.train import load_rows

    task = build(config, load_rows(config))
    assert task.head is not None
    return {**kv_tensors(task.model.kv("prefix")), **{f"head.{name}": x for name, x in task.head.plain().items()}}


def relative_difference(one: Path, other: Path, start: Tensors) -> float:
    """Of what training changed, so that the parts that start alike do not hide a difference."""
    a, b = (load_file(folder / "prefix.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    changes = [torch.cat([(x[k] - start[k]).flatten() for k in sorted(x)]) for x in (a, b)]
    assert changes[0].norm() > 0.1
    return float((changes[0] - changes[1]).norm() / changes[0].norm())


def figures(folder: Path) -> dict[str, object]:
    training = json.loads((folder / "prefix.json").read_text())["training"]
    return {key: training[key] for key in ("test", "zero_shot", "steps", "best_step", "validations", "losses")}


def assert_same_figures(one: Path, other: Path) -> None:
    def numbers(value: object) -> list[float]:
        if isinstance(value, dict | list):
            return [n for item in (value.values() if isinstance(value, dict) else value) for n in numbers(item)]
        return [float(value)]  # type: ignore[arg-type]

    assert numbers(figures(one)) == pytest.approx(numbers(figures(other)), rel=1e-4)


def launched(*command: str, launcher: list[str] = LAUNCH, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*launcher, *command], env=ENVIRONMENT | variables, capture_output=True, text=True, timeout=300
    )


def test_two_processes_train_the_prefix_of_one(tmp_path: Path, tiny_llama: Path, topics: Path) -> None:
    """The base whole (DDP) and sharded (FSDP2), the same data in the same order, each process half of the rows."""
    config = settings(tmp_path / "one", tiny_llama, topics)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    run = launched(str(HERE / "distributed_worker.py"), str(tmp_path))
    assert run.returncode == 0, run.stderr
    train(config)
    start = start_of(config)
    for name, sharded in (("whole", [False]), ("sharded", [True])):
        seen = [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
        assert seen[0]["rows"] == [4] * 8 + [2], "the first takes every second row, from the first on"
        assert seen[1]["rows"] == [3] * 8 + [2]
        assert all(s["sharded"] == sharded for s in seen)
        assert relative_difference(tmp_path / "one", tmp_path / name, start) < 1e-3
        assert_same_figures(tmp_path / "one", tmp_path / name)
        headers = [json.loads((tmp_path / n / "prefix.json").read_text()) for n in ("one", name)]
        assert headers[0]["base"] == headers[1]["base"]
        assert headers[0]["sites"] == headers[1]["sites"]


def arguments(config: TrainConfig, *more: str) -> list[str]:
    """As on the command line. `--` keeps torchrun from reading options of foreword that begin like its own."""
    given = {
        "--model": config.model,
        "--data": config.data,
        "--train-rows": config.train_rows,
        "--batch-size": config.batch_size,
        "--form": config.prefix.form,
        "--length": config.prefix.length,
        "--max-length": config.max_length,
        "--learning-rate": config.learning_rate,
        "--save-steps": config.save_steps,
        "--dtype": config.dtype,
        "--output": config.output,
    }
    return ["-m", "--", "foreword", "train", *(str(x) for pair in given.items() for x in pair), *more]


def sentences(stderr: str) -> list[str]:
    return re.findall(r"^foreword: (.*)$", stderr, re.MULTILINE)


@pytest.mark.slow
def test_accelerate_shards_by_its_configuration(tmp_path: Path, tiny_llama: Path, topics: Path) -> None:
    config = settings(tmp_path / "one", tiny_llama, topics)
    train(config)
    configuration = str(HERE.parent / "examples" / "fsdp2.yaml")
    accelerate = [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file", configuration]
    accelerate += ["--num_processes", "2", "--main_process_port", "0"]
    command = [a for a in arguments(settings(tmp_path / "two", tiny_llama, topics)) if a != "--"]
    run = launched(*command, launcher=accelerate)
    assert run.returncode == 0, run.stderr
    saved = json.loads((tmp_path / "two" / "prefix.json").read_text())
    assert saved["training"]["settings"]["shard"] is True
    assert relative_difference(tmp_path / "one", tmp_path / "two", start_of(config)) < 1e-3
    assert run.stderr.count("Testing on") == 1  # one process speaks
    assert run.stdout.count("Saved") == 1


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_ctrl_c_stops_both_and_resuming_ends_the_same(
    tmp_path: Path, tiny_llama: Path, topics: Path, shard: bool
) -> None:
    config = settings(tmp_path / "one", tiny_llama, topics)
    longer = ["--epochs", "60", *(["--shard"] if shard else [])]
    stopped = settings(tmp_path / "two", tiny_llama, topics)
    process = subprocess.Popen(
        [*LAUNCH, *arguments(stopped, *longer)], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    training = stopped.output / "training"
    while not checkpoints.complete_checkpoints(training):
        assert process.poll() is None, process.stderr.read()  # type: ignore[union-attr]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode != 0
    found = sentences(stderr)
    assert len(found) == 1, stderr
    assert re.fullmatch(r"interrupted at step \d+; the state is saved; .*", found[0])
    last = checkpoints.complete_checkpoints(training)[-1]
    assert int(last.name.split("-")[1]) < 540, "stopped before the end"
    assert {p.name for p in last.iterdir()} >= {"rng-0.json", "rng-1.json"}
    resumed = launched("-m", "--", "foreword", "train", "--resume", "--output", str(stopped.output))
    assert resumed.returncode == 0, resumed.stderr
    train(replace(config, epochs=60))
    assert relative_difference(tmp_path / "one", tmp_path / "two", start_of(config)) < 1e-3


@pytest.mark.slow
def test_errors_are_said_once(tmp_path: Path, tiny_llama: Path, topics: Path) -> None:
    config = settings(tmp_path / "out", tiny_llama, topics)
    config.output.mkdir()
    (config.output / "mine").touch()
    run = launched(*arguments(config))
    assert run.returncode != 0
    assert sentences(run.stderr) == [f"{config.output} exists and is not empty; use another output, or remove it."]
    run = launched(*arguments(settings(tmp_path / "nan", tiny_llama, topics), "--learning-rate", "1e38"))
    assert run.returncode != 0
    assert len(sentences(run.stderr)) == 1
    assert "The loss is not a finite number at step" in sentences(run.stderr)[0]
    run = launched(*arguments(settings(tmp_path / "small", tiny_llama, topics), "--batch-size", "1"))
    assert sentences(run.stderr) == [
        "A batch of 1 cannot be shared by 2 processes; raise the batch size, which counts the rows of all of them."
    ]
    projected = [*arguments(settings(tmp_path / "p", tiny_llama, topics)), "--form", "projected", "--shard"]
    run = launched(*projected)
    assert [s.split(" of ")[0] for s in sentences(run.stderr)] == ["the form projected runs projections"], run.stderr
    old = launched(*arguments(settings(tmp_path / "f", tiny_llama, topics)), ACCELERATE_USE_FSDP="true")
    assert sentences(old.stderr) == ["a base is sharded by FSDP2 alone; set fsdp_version: 2 in accelerate's settings."]
