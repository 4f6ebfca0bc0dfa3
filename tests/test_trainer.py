"""Each behaviour that PrefixTrainer adds, by really training a toy model with a frozen base."""

import errno
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from foreword import checkpoints
from foreword.arguments import training_arguments
from foreword.averaging import WeightAverage
from foreword.bases import machine_has_fast_bf16
from foreword.batching import BucketSampler, Rows
from foreword.checkpoints import last_checkpoint
from foreword.errors import InputError, RunError
from foreword.trainer import PrefixTrainer

FILES = {
    *("complete", "trainable.safetensors", "optimizer.safetensors", "optimizer.json"),
    *("rng.safetensors", "rng.json", "trainer_state.json"),
}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """The toy is too small for more, and other processes share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Toy(nn.Module):
    """A frozen base, a trainable prefix behind dropout, and a trainable head."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.base = nn.Linear(64, 2048, bias=False).requires_grad_(False)
        self.prefix = nn.Parameter(torch.randn(2048, generator=generator) * 0.1)
        self.head = nn.Linear(2048, 2)
        for p in (self.base.weight, self.head.weight, self.head.bias):
            p.data = torch.randn(p.shape, generator=generator) * 0.02
        self.poison_at: int | None = None
        self.calls = 0

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None, **extra: Any) -> dict[str, Any]:
        assert not extra
        self.calls += self.training
        hidden = nn.functional.dropout(self.base(x) + self.prefix, 0.3, self.training)
        logits = self.head(hidden)
        loss = nn.functional.cross_entropy(logits, labels)
        if self.training and self.calls == self.poison_at:
            loss = loss * float("nan")
        return {"loss": loss, "logits": logits}


def toy_rows(count: int = 90, seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 64, generator=generator)
    lengths = torch.randint(1, 50, (count,), generator=generator).tolist()
    rows = [{"x": x[i], "labels": int(x[i, 0] > 0)} for i in range(count)]
    return Rows(rows, lengths)


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def toy_arguments(folder: Path, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        **dict(epochs=2, max_steps=None, batch_size=4, learning_rate=1e-2, warmup_ratio=0.1),
        **dict(weight_decay=0.01, max_grad_norm=1.0, eval_steps=5, save_steps=3, seed=3, bf16=False),
        **dict(gradient_accumulation=2, gradient_checkpointing=False, schedule="linear", metric="accuracy"),
    }
    return training_arguments(folder, **(settings | changes))


def toy_trainer(folder: Path, model: Toy | None = None, **changes: Any) -> PrefixTrainer:
    """90 rows, micro-batches of 4, 2 a step: 12 steps an epoch, the last of one and a half micro-batches."""
    names = ("patience", "average", "learning_rates", "heading", "train_dataset", "callbacks")
    own = {name: changes.pop(name) for name in names if name in changes}
    given = {"train_dataset": toy_rows(), "eval_dataset": toy_rows(20, 1), "compute_metrics": accuracy}
    return PrefixTrainer(model or Toy(), toy_arguments(folder, **changes), **(given | own))


def trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class Slow(TrainerCallback):
    """Says when training starts, and makes steps long enough to be killed in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        (self.folder / "started").touch()
        time.sleep(0.02)


def run_child(folder: Path, die_in: str | None) -> None:
    """One process of the kill tests: resume where possible, train to the end, write the result."""
    torch.set_num_threads(1)
    os.dup2(os.open(folder / "log", os.O_CREAT | os.O_APPEND | os.O_WRONLY), 2)
    trainer = toy_trainer(folder / "run", callbacks=[Slow(folder)])
    last = last_checkpoint(folder / "run")
    if die_in is not None:
        setattr(checkpoints, die_in, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    trainer.train(str(last) if last else None)
    checkpoints.write_trainable(folder, trainer.model)  # of the best step


@pytest.fixture(scope="module")
def server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["foreword.trainer"])
    return context


def child(server: Any, folder: Path, kill_after: float | None = None, die_in: str | None = None) -> int:
    """Run a child, killed `kill_after` seconds after its first step began; its exit code."""
    folder.mkdir(exist_ok=True)
    (folder / "started").unlink(missing_ok=True)
    process = server.Process(target=run_child, args=(folder, die_in))
    process.start()
    while kill_after is not None and process.is_alive() and not (folder / "started").exists():
        time.sleep(0.005)
    if kill_after is not None:
        time.sleep(kill_after)
        process.kill()
    process.join(60)
    return process.exitcode


@pytest.fixture(scope="module")
def unkilled(server: Any, tmp_path_factory: Any) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("unkilled")
    assert child(server, folder) == 0, (folder / "log").read_text()
    return results(folder)


def results(folder: Path) -> dict[str, torch.Tensor]:
    """The trainable tensors of a child's best step and of its last."""
    best = load_file(folder / "trainable.safetensors")
    last = load_file(folder / "run" / "checkpoint-24" / "trainable.safetensors")
    return best | {f"last {name}": tensor for name, tensor in last.items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


# ---- 1. batches


def test_sampler_gives_every_row_once_in_batches_of_similar_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 203).tolist()
    sampler = BucketSampler(lengths, 4, seed=1)
    order = list(sampler)
    assert sorted(order) == list(range(203))
    spread = [np.ptp([lengths[i] for i in order[k : k + 4]]) for k in range(0, 200, 4)]
    assert np.mean(spread) < 30  # unsorted: about 300
    means = [lengths[order[k]] for k in range(0, 200, 4)]
    assert means != sorted(means) and means != sorted(means, reverse=True)


def test_sampler_depends_on_seed_and_epoch_alone() -> None:
    lengths = list(range(50))
    first, again, other = (BucketSampler(lengths, 4, seed) for seed in (1, 1, 2))
    assert list(first) == list(first) == list(again) != list(other)
    again.set_epoch(1)
    assert list(first) != list(again)


def test_trainer_sets_the_epoch_of_the_sampler(tmp_path: Path) -> None:
    seen: list[int] = []
    rows = toy_rows()
    rows.rows = [row | {"x": row["x"].clone()} for row in rows.rows]
    trainer = toy_trainer(tmp_path, train_dataset=rows, eval_steps=None)
    trainer.data_collator = lambda batch: (
        seen.extend(int(row["x"][0] * 1e6) for row in batch),
        {"x": torch.stack([r["x"] for r in batch]), "labels": torch.tensor([r["labels"] for r in batch])},
    )[1]
    trainer.train()
    names = [int(row["x"][0] * 1e6) for row in rows.rows]
    for epoch in range(2):
        sampler = BucketSampler(rows.lengths, 4, seed=3)
        sampler.set_epoch(epoch)
        assert seen[90 * epoch : 90 * (epoch + 1)] == [names[i] for i in sampler]


def test_predictions_come_in_the_order_of_the_rows(tmp_path: Path) -> None:
    trainer, rows, given = toy_trainer(tmp_path), toy_rows(23, 4), []
    trainer.compute_metrics = lambda prediction: given.append(prediction.label_ids) or {}
    output = trainer.predict(rows)
    labels = [row["labels"] for row in rows.rows]
    assert output.label_ids.tolist() == given[0].tolist() == labels
    with torch.no_grad():
        model = trainer.model.eval()
        x = torch.stack([row["x"] for row in rows.rows])
        wanted = model(x, torch.tensor(labels))
    torch.testing.assert_close(torch.tensor(output.predictions), wanted["logits"])
    assert output.metrics["test_loss"] == pytest.approx(wanted["loss"].item(), rel=1e-5)


def test_accumulated_gradient_is_the_mean_over_all_rows(tmp_path: Path) -> None:
    """14 rows as 4 + 4 + 4 + 2 in one step give the gradient of one batch of 14."""
    steps = []
    for batch_size, accumulation in ((4, 4), (14, 1)):
        model = Toy()
        trainer = toy_trainer(
            tmp_path / str(batch_size),
            model,
            **dict(batch_size=batch_size, gradient_accumulation=accumulation, max_steps=1, warmup_ratio=0),
            **dict(train_dataset=toy_rows(14), eval_steps=None, max_grad_norm=0),
        )
        model.forward = lambda x, labels, m=model: {  # type: ignore[method-assign]
            "loss": nn.functional.cross_entropy(m.head(m.base(x) + m.prefix), labels),
            "logits": x,
        }
        trainer.train()
        steps.append(trainer.optimizer.state_dict()["state"][0]["exp_avg"])
        assert trainer.state.log_history[0]["loss"] == pytest.approx(0.68, abs=0.1)
    torch.testing.assert_close(steps[0], steps[1])


# ---- 2, 3. checkpoints and resuming


def test_checkpoint_holds_the_trainable_tensors_only_and_no_pickle(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, max_steps=4)
    trainer.train()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3", "checkpoint-4"}
    for folder in tmp_path.iterdir():
        assert {path.name for path in folder.iterdir()} == FILES
    last = tmp_path / "checkpoint-4"
    assert load_file(last / "trainable.safetensors").keys() == {"prefix", "head.weight", "head.bias"}
    moments = load_file(last / "optimizer.safetensors")
    assert sum(t.numel() for t in moments.values()) == 2 * (2048 + 4096 + 2) + 3
    assert str(tmp_path) not in (last / "trainer_state.json").read_text()
    trainer.save_model(str(tmp_path / "final"))
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["trainable.safetensors"]


def test_unfinished_checkpoints_are_removed_and_numbers_are_ordered(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "nowhere") is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11", "checkpoint-best"):
        (tmp_path / name).mkdir()
    for name in ("checkpoint-9", "checkpoint-10"):
        (tmp_path / name / "complete").touch()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-9", "checkpoint-10", "checkpoint-best"}


def test_killed_at_random_moments_ends_in_the_same_bits(server: Any, unkilled: Any, tmp_path: Path) -> None:
    delays = [random.SystemRandom().uniform(0.0, 0.5) for _ in range(6)]
    print("killed after", delays)
    codes = [child(server, tmp_path, kill_after=delay) for delay in delays]
    assert -signal.SIGKILL in codes
    if not (tmp_path / "trainable.safetensors").exists():
        assert child(server, tmp_path) == 0, (tmp_path / "log").read_text()
    assert_same(results(tmp_path), unkilled)


def test_killed_before_the_first_checkpoint_starts_again(server: Any, unkilled: Any, tmp_path: Path) -> None:
    assert child(server, tmp_path, kill_after=0) == -signal.SIGKILL
    assert last_checkpoint(tmp_path / "run") is None
    assert child(server, tmp_path) == 0, (tmp_path / "log").read_text()
    assert_same(results(tmp_path), unkilled)


def test_killed_while_saving_leaves_a_folder_that_is_removed(server: Any, unkilled: Any, tmp_path: Path) -> None:
    assert child(server, tmp_path, die_in="write_optimizer") == -signal.SIGKILL
    half = tmp_path / "run" / "checkpoint-3"
    assert half.is_dir() and not (half / "complete").exists()
    assert child(server, tmp_path, die_in="rotate") == -signal.SIGKILL
    assert last_checkpoint(tmp_path / "run") == half
    assert child(server, tmp_path) == 0, (tmp_path / "log").read_text()
    assert_same(results(tmp_path), unkilled)


@pytest.mark.parametrize("stop", [3, 5, 12, 17])
def test_resuming_a_copied_folder_ends_in_the_same_bits(tmp_path: Path, stop: int) -> None:
    whole = toy_trainer(tmp_path / "whole")
    whole.train()
    part = toy_trainer(tmp_path / "part", callbacks=[InterruptAt(stop)])
    with pytest.raises(RunError):
        part.train()
    (tmp_path / "part").rename(tmp_path / "moved")
    rest = toy_trainer(tmp_path / "moved")
    rest.train(resume_from_checkpoint=True)
    last = [load_file(tmp_path / run / "checkpoint-24" / "trainable.safetensors") for run in ("whole", "moved")]
    assert_same(*last)
    assert_same(trainable(rest.model), trainable(whole.model))
    assert rest.state.best_global_step == whole.state.best_global_step
    assert rest.state.best_metric == whole.state.best_metric


def test_resuming_a_finished_run_trains_no_further(tmp_path: Path) -> None:
    first = toy_trainer(tmp_path, max_steps=4)
    first.train()
    model = Toy()
    second = toy_trainer(tmp_path, model, max_steps=4)
    second.train(resume_from_checkpoint=True)
    assert model.calls == 0
    assert_same(trainable(model), trainable(first.model))


def test_seconds_count_the_processes_before(tmp_path: Path) -> None:
    first = toy_trainer(tmp_path, callbacks=[Slow(tmp_path), InterruptAt(10)])
    with pytest.raises(RunError):
        first.train()
    second = toy_trainer(tmp_path)
    second.train(resume_from_checkpoint=True)
    assert second.seconds - second.seconds_here >= 10 * 0.02
    assert 0 < second.seconds_here < second.seconds
    at_the_end = second.seconds
    time.sleep(0.01)
    assert second.seconds == at_the_end


def test_bad_starting_points_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no complete checkpoint"):
        toy_trainer(tmp_path).train(resume_from_checkpoint=True)
    toy_trainer(tmp_path, max_steps=3).train()
    with pytest.raises(InputError, match="earlier run"):
        toy_trainer(tmp_path).train()
    model = Toy()
    model.prefix = nn.Parameter(torch.zeros(7))
    with pytest.raises(InputError, match=r"'prefix' is \[2048\] torch.float32 there and \[7\]"):
        checkpoints.read_trainable(tmp_path / "checkpoint-3", model)


# ---- 4. the best step


class Metrics:
    """A validation metric that follows a script."""

    def __init__(self, values: list[float]) -> None:
        self.values = iter(values)

    def __call__(self, prediction: Any) -> dict[str, float]:
        return {"accuracy": next(self.values)}


def test_best_step_is_loaded_at_the_end_and_kept_on_disk(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, max_steps=14, eval_steps=2, save_steps=5)
    trainer.compute_metrics = Metrics([0.1, 0.9, 0.3, 0.4, 0.5, 0.6, 0.7])
    trainer.train()
    assert trainer.state.best_global_step == 4  # not a saving step
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", "checkpoint-14"}
    assert_same(trainable(trainer.model), load_file(tmp_path / "checkpoint-4" / "trainable.safetensors"))


class Recorded(TrainerCallback):
    """The parameters after every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.steps.append(trainable(model))


def averaged(steps: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The average in closed form: step s weighs s (s + 1) (s + 2)."""
    weights = torch.tensor([float(s * (s + 1) * (s + 2)) for s in range(1, len(steps) + 1)], dtype=torch.float64)
    return {
        name: (torch.stack([step[name].double() for step in steps], -1) @ (weights / weights.sum())).float()
        for name in steps[0]
    }


def test_the_average_of_the_parameters_is_validated_and_ends_in_the_model(tmp_path: Path) -> None:
    recorded = Recorded()
    run = dict(average=True, callbacks=[recorded], schedule="constant", learning_rate=1e-1)
    trainer = toy_trainer(tmp_path / "best", max_steps=9, eval_steps=4, metric="loss", **run)
    trainer.train()
    assert trainer.state.best_global_step == 8
    torch.testing.assert_close(trainable(trainer.model), averaged(recorded.steps[:8]), rtol=1e-5, atol=1e-6)
    after = trainer.evaluate()["eval_loss"]  # of what is in the model now
    assert after == pytest.approx(trainer.state.best_metric, rel=1e-6)
    for name, never in (("off", None), ("beyond the end", 100)):
        recorded.steps.clear()
        trainer = toy_trainer(tmp_path / name, max_steps=9, eval_steps=never, **run)
        trainer.train()
        torch.testing.assert_close(trainable(trainer.model), averaged(recorded.steps), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stop", [3, 4])
def test_an_average_goes_on_over_a_resume_to_the_same_bits(tmp_path: Path, stop: int) -> None:
    run = dict(max_steps=9, eval_steps=4, average=True)
    whole = toy_trainer(tmp_path / "whole", **run)
    whole.train()
    with pytest.raises(RunError, match="interrupted"):
        toy_trainer(tmp_path / "cut", callbacks=[InterruptAt(stop)], **run).train()
    resumed = toy_trainer(tmp_path / "cut", **run)
    resumed.train(resume_from_checkpoint=True)
    assert_same(trainable(whole.model), trainable(resumed.model))


def test_a_parameter_without_a_gradient_counts_no_step() -> None:
    model = nn.ParameterDict({"first": nn.Parameter(torch.zeros(2)), "second": nn.Parameter(torch.ones(2))})
    average = WeightAverage(model)
    model["first"].grad = torch.ones(2)
    average.update()
    model["first"].data += 1
    with average.applied():
        assert model["first"].tolist() == [0, 0] and model["second"].tolist() == [1, 1]
    assert model["first"].tolist() == [1, 1]
    model["second"].grad, model["first"].grad = torch.ones(2), None
    average.update()
    assert average.tensors().keys() == {"first", "first.steps", "second", "second.steps"}
    assert (int(average.tensors()["first.steps"]), int(average.tensors()["second.steps"])) == (1, 1)


def test_early_stopping_counts_across_a_resume(tmp_path: Path) -> None:
    values = [0.5, 0.6, 0.2, 0.3, 0.4, 0.5]
    trainer = toy_trainer(tmp_path, eval_steps=2, patience=3, callbacks=[InterruptAt(7)])
    trainer.compute_metrics = Metrics(values)
    with pytest.raises(RunError):
        trainer.train()
    resumed = toy_trainer(tmp_path, eval_steps=2, patience=3)
    resumed.compute_metrics = Metrics(values[3:])
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 10
    assert resumed.state.best_global_step == 4


def test_lower_is_better_for_losses_and_errors(tmp_path: Path) -> None:
    assert toy_arguments(tmp_path, metric="accuracy").greater_is_better
    assert not toy_arguments(tmp_path, metric="rmse").greater_is_better
    assert not toy_arguments(tmp_path, metric="loss").greater_is_better


# ---- 5. a loss that is not a number


@pytest.mark.parametrize("accumulation", [1, 2])
def test_nan_loss_stops_before_the_step_and_keeps_the_last_good_state(tmp_path: Path, accumulation: int) -> None:
    model = Toy()
    model.poison_at = 4 * accumulation + 1  # in step 5
    kept = tmp_path / "bad" / "checkpoint-4"
    trainer = toy_trainer(tmp_path / "bad", model, gradient_accumulation=accumulation, eval_steps=None)
    with pytest.raises(RunError, match=f"step 5, .* kept in {kept}; use a lower learning rate than 0.01"):
        trainer.train()
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert last_checkpoint(tmp_path / "bad") == kept
    assert_same(load_file(kept / "trainable.safetensors"), trainable(model))
    # Resuming with a lower learning rate uses it.
    lower = {"learning_rate": 1e-3, "gradient_accumulation": accumulation, "eval_steps": None, "max_steps": 8}
    resumed = toy_trainer(tmp_path / "bad", **lower)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.lr_scheduler.base_lrs == [1e-3, 1e-3]
    rates: list[float] = []
    watch = toy_trainer(tmp_path / "bad", **(lower | {"max_steps": 12}), callbacks=[Rates(rates)])
    watch.train(resume_from_checkpoint=True)
    assert len(rates) == 4 and 0 < max(rates) <= 1e-3


def test_nan_loss_at_the_first_step_says_that_nothing_was_saved(tmp_path: Path) -> None:
    model = Toy()
    model.poison_at = 1
    before = trainable(model)
    with pytest.raises(RunError, match="step 1, and no checkpoint was saved yet"):
        toy_trainer(tmp_path, model).train()
    assert_same(trainable(model), before)


# ---- 6. Ctrl-C


class Rates(TrainerCallback):
    def __init__(self, rates: list[float]) -> None:
        self.rates = rates

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


class InterruptAt(TrainerCallback):
    def __init__(self, step: int, times: int = 1) -> None:
        self.step, self.times = step, times

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for _ in range(self.times if state.global_step == self.step - 1 else 0):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)


def test_first_ctrl_c_saves_and_stops_after_the_step(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    trainer = toy_trainer(tmp_path, callbacks=[InterruptAt(4)])
    with pytest.raises(RunError, match="interrupted at step 4; the state is saved; run again with --resume"):
        trainer.train()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    assert signal.getsignal(signal.SIGINT) is before


def test_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        toy_trainer(tmp_path, callbacks=[InterruptAt(5, times=2)]).train()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    assert signal.getsignal(signal.SIGINT) is before


# ---- 7. a full disk


class FileLimitAt(TrainerCallback):
    """From a step on, no file can grow beyond 4 kB, as on a disk that is full."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))


def test_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = toy_trainer(tmp_path, eval_steps=None, callbacks=[FileLimitAt()])
    try:
        with pytest.raises(RunError) as caught:
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.search(r"checkpoint-6 could not be written \(.*\); .*checkpoint-3 is kept\.", str(caught.value))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3"}


def test_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints, "finish", full)
    with pytest.raises(RunError, match=r"No space left on device.*no earlier checkpoint was saved"):
        toy_trainer(tmp_path).train()
    assert list(tmp_path.iterdir()) == []


# ---- 8. progress


def test_progress_lines_where_stderr_is_no_terminal(tmp_path: Path, capfd: Any) -> None:
    toy_trainer(tmp_path, max_steps=10).train()
    out, err = capfd.readouterr()
    assert out == ""
    line = next(line for line in err.splitlines() if line.startswith("training 10/10"))
    for fact in (r"loss [\d.]+", r"learning rate [\d.e-]+", r"[\d.]+ rows/s", r"0:00:00 left"):
        assert re.search(fact, line), fact
    assert re.search(r"validation accuracy [\d.]+", err)


def test_progress_lines_on_a_terminal_that_cannot_move_its_cursor(
    tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    toy_trainer(tmp_path, max_steps=10, heading="trial 3").train()
    err = capfd.readouterr().err
    assert "trial 3: training 10/10  loss" in err and "\x1b" not in err


def test_prediction_alone_shows_a_panel_and_ends_it(
    tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    trainer = toy_trainer(tmp_path)
    trainer.predict(toy_rows(20))
    assert "validation" in capfd.readouterr().err
    assert trainer._progress._panel is None


def test_long_validation_shows_progress(tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foreword.progress.LINE_SECONDS", 0)
    toy_trainer(tmp_path).evaluate()
    assert "validation 3/5" in capfd.readouterr().err


# ---- 9. optimizer and arguments


def test_head_has_a_learning_rate_of_its_own(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, learning_rates={"head": 0.5})
    groups = trainer.create_optimizer().param_groups
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    model = trainer.model
    assert found == {
        id(model.prefix): (1e-2, 0.01),
        id(model.head.weight): (0.5, 0.01),
        id(model.head.bias): (0.5, 0.0),
    }
    del model.head
    with pytest.raises(InputError, match="no trainable parameter is named 'head'"):
        toy_trainer(tmp_path, nn.Linear(2, 2), learning_rates={"head": 0.5}).create_optimizer()  # type: ignore[arg-type]


def test_head_learning_rate_survives_a_resume(tmp_path: Path) -> None:
    whole = toy_trainer(tmp_path / "whole", learning_rates={"head": 0.1}, eval_steps=None)
    whole.train()
    with pytest.raises(RunError):
        toy_trainer(
            tmp_path / "part", learning_rates={"head": 0.1}, eval_steps=None, callbacks=[InterruptAt(7)]
        ).train()
    rest = toy_trainer(tmp_path / "part", learning_rates={"head": 0.1}, eval_steps=None)
    rest.train(resume_from_checkpoint=True)
    assert_same(trainable(rest.model), trainable(whole.model))


def test_gradient_checkpointing_calls_the_models_own_switch(tmp_path: Path) -> None:
    model, given = Toy(), []
    with pytest.raises(InputError, match="Toy cannot use gradient checkpointing"):
        toy_trainer(tmp_path, Toy(), gradient_checkpointing=True)
    model.gradient_checkpointing_enable = lambda gradient_checkpointing_kwargs: given.append(  # type: ignore
        gradient_checkpointing_kwargs
    )
    toy_trainer(tmp_path, model, gradient_checkpointing=True, max_steps=1).train()
    assert given == [{"use_reentrant": False}]


def test_bf16_trains_under_autocast_with_float32_parameters(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, bf16=True, max_steps=3)
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-3" / "trainable.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}


def test_base_stays_as_it_was(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, max_steps=3)
    trainer.train()
    assert torch.equal(trainer.model.base.weight, Toy().base.weight)
    assert not torch.equal(trainer.model.prefix, Toy().prefix)


def test_arguments_are_checked_and_bf16_speed_is_known(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="warmup ratio"):
        toy_arguments(tmp_path, warmup_ratio=1.0)
    assert isinstance(machine_has_fast_bf16(), bool)
    assert json.loads(toy_arguments(tmp_path).to_json_string())["report_to"] in ([], ["none"])
