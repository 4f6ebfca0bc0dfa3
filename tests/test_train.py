"""A run as a whole: killed and resumed, interrupted, gone wrong, stopped early, with a linear head."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import interrupted_at_step
from safetensors.torch import load_file

from foreword import InputError, PrefixConfig, RunError, TrainConfig, files, load
from foreword.train import train

FAST = {"epochs": 2, "batch_size": 8, "max_length": 40, "learning_rate": 0.03, "zero_shot": False}


def config(model: Path, data: Path, output: Path, **changes: object) -> TrainConfig:
    return replace(TrainConfig(output=output, model=str(model), data=str(data), **FAST), **changes)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "prefix.safetensors")


def equal(a: Path, b: Path) -> bool:
    first, second = tensors(a), tensors(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def command(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    where = ["--model", str(model), "--data", str(data), "--output", str(output)]
    settings = "--epochs 4 --batch-size 4 --max-length 40 --save-steps 3 --no-zero-shot --form mlp".split()
    return [sys.executable, "-m", "foreword", "train", *where, *settings, *more]


def kill_at_random(arguments: list[str], running: Path, rng: random.Random) -> int:
    """SIGKILL once a random number of steps is done; how many checkpoints there were."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    wanted = rng.randrange(0, 50)
    while process.poll() is None:
        steps = [int(p.name.split("-")[1]) for p in running.glob("checkpoint-*")]
        if steps and max(steps) >= wanted:
            time.sleep(rng.random() * 0.2)
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return len(list(running.glob("checkpoint-*")))


def kill_and_resume(tiny_llama: Path, topics: Path, tmp_path: Path, times: int) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    whole = tmp_path / "whole"
    subprocess.run(command(tiny_llama, topics, whole), check=True, capture_output=True, env=environment)
    for i in range(times):
        output = tmp_path / f"killed-{i}"
        kill_at_random(command(tiny_llama, topics, output), output / "training", random.Random(i))
        if not (output / "prefix.json").exists():
            resumed = command(tiny_llama, topics, output, "--resume")
            subprocess.run(resumed, check=True, capture_output=True, env=environment)
        assert equal(whole, output), f"run {i} differs"


def test_a_run_killed_at_a_random_step_and_resumed_ends_in_the_same_tensors(
    tiny_llama: Path, topics: Path, tmp_path: Path
) -> None:
    kill_and_resume(tiny_llama, topics, tmp_path, times=1)


@pytest.mark.slow
def test_five_runs_killed_at_random_steps_and_resumed_end_in_the_same_tensors(
    tiny_llama: Path, topics: Path, tmp_path: Path
) -> None:
    kill_and_resume(tiny_llama, topics, tmp_path, times=5)


def test_ctrl_c_saves_the_state_and_resume_ends_as_if_nothing_had_been(
    tiny_llama: Path, topics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config(tiny_llama, topics, tmp_path / "whole"))
    interrupted = config(tiny_llama, topics, tmp_path / "cut")

    with (
        interrupted_at_step(3, monkeypatch),
        pytest.raises(RunError, match="interrupted at step 3; the state is saved; run again with --resume"),
    ):
        train(interrupted)
    train(interrupted, resume=True)
    assert equal(tmp_path / "whole", tmp_path / "cut")
    assert not (tmp_path / "cut" / "training").exists()


def test_resuming_with_other_settings_is_refused(tiny_llama: Path, topics: Path, tmp_path: Path) -> None:
    first = config(tiny_llama, topics, tmp_path / "p", learning_rate=float("inf"))
    with pytest.raises(RunError):
        train(first)
    with pytest.raises(InputError, match="started with another learning_rate; resume it unchanged"):
        train(replace(first, learning_rate=0.1), resume=True)
    with pytest.raises(InputError, match="holds an unfinished run; go on with --resume"):
        train(first)


def test_a_loss_that_is_not_a_number_stops_the_run_and_says_so(tiny_llama: Path, topics: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"The loss is not a finite number at step \d+, and .*lower learning rate"):
        train(config(tiny_llama, topics, tmp_path / "p", learning_rate=float("inf")))
    assert not (tmp_path / "p" / "prefix.json").exists()


@pytest.mark.parametrize("form", ["direct", "projected", "mlp"])
@pytest.mark.parametrize("start", ["instruction", "vocabulary", "random"])
def test_every_form_from_every_start_trains_saves_and_loads(
    tiny_llama: Path, topics: Path, tmp_path: Path, form: str, start: str
) -> None:
    prefix = PrefixConfig(form=form, start=start, length=6)  # type: ignore[arg-type]
    result = train(config(tiny_llama, topics, tmp_path / "p", prefix=prefix, max_steps=3))
    header = files.read_header(tmp_path / "p")
    assert (header["prefix"]["form"], header["prefix"]["start"], header["prefix"]["length"]) == (form, start, 6)
    classifier = load(tmp_path / "p")
    scores = classifier.predict(["a dog runs"])[0]["scores"]
    assert set(scores) == {"animal", "tool"}
    assert result.summary["steps"] == 3
    with pytest.raises(InputError, match=r"exists and is not empty"):
        train(config(tiny_llama, topics, tmp_path / "p", prefix=prefix))


def test_a_linear_head_learns_and_comes_back(tiny_llama: Path, topics: Path, tmp_path: Path) -> None:
    settings = {"head": "linear", "epochs": 12, "learning_rate": 0.01, "head_learning_rate": 0.01, "zero_shot": True}
    result = train(config(tiny_llama, topics, tmp_path / "p", **settings))
    assert result.zero_shot is None  # a head that was never trained says nothing
    assert result.test["accuracy"] >= 0.75
    again = load(tmp_path / "p")
    assert again.head is not None and torch.equal(again.head.weight, tensors(tmp_path / "p")["head.weight"])


def test_gradient_accumulation_and_checkpointing_end_where_the_plain_run_ends(
    tiny_llama: Path, topics: Path, tmp_path: Path
) -> None:
    plain = config(tiny_llama, topics, tmp_path / "plain")
    train(plain)
    train(replace(plain, output=tmp_path / "recomputed", gradient_checkpointing=True))
    assert equal(tmp_path / "plain", tmp_path / "recomputed")
    train(replace(plain, output=tmp_path / "accumulated", batch_size=4, gradient_accumulation=2))
    a, b = tensors(tmp_path / "plain"), tensors(tmp_path / "accumulated")
    assert files.read_header(tmp_path / "accumulated")["training"]["steps"] == 16
    assert all(a[name].shape == b[name].shape for name in a)


def test_a_bfloat16_base_trains_a_float32_prefix(tiny_llama: Path, topics: Path, tmp_path: Path) -> None:
    result = train(config(tiny_llama, topics, tmp_path / "p", dtype="bfloat16", epochs=1))
    assert all(tensor.dtype == torch.float32 for tensor in tensors(tmp_path / "p").values())
    assert result.summary["losses"][-1][1] == result.summary["losses"][-1][1]  # a number


def test_early_stopping_keeps_the_best_step(tiny_llama: Path, topics: Path, tmp_path: Path) -> None:
    result = train(config(tiny_llama, topics, tmp_path / "p", epochs=20, save_steps=2, patience=2, learning_rate=0.5))
    assert result.summary["steps"] < 160
    assert result.summary["best_step"] <= result.summary["steps"]


def test_a_finished_prefix_goes_on_training_from_where_it_ended(tiny_llama: Path, topics: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from foreword import PrefixModel

    train(config(tiny_llama, topics, tmp_path / "p", max_steps=2))
    model = PrefixModel(AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama))
    form = model.load(tmp_path / "p", "more", trainable=True)
    assert form.count() == model.count("more") > 0
    kv = model.kv("more")
    assert all(torch.equal(kv.sites[n].keys[0], tensors(tmp_path / "p")[f"{n}.keys"]) for n in kv.sites)
