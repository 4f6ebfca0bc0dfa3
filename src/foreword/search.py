"""A search for better settings of a run: Optuna's TPE over form, length, start, layers and learning rate.

Trials are compared by their validation loss alone; the test rows are read once, by the winner. OUTPUT holds

    study.db      Optuna's study; a search that was killed goes on from it
    trials.json   every trial as a row, and what was found
    report.html   the same as a page with pictures
    best/         the winner, as `foreword.train` writes it
    trials/N/     while it runs: the trial's checkpoints, and those of the best so far
    tensorboard/  with report_to="tensorboard", a log per trial
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from optuna import TrialPruned
from optuna.trial import Trial
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from . import files, processes
from .config import TrainConfig, claim, write_json
from .data import Data
from .errors import DivergedError, InputError, RunError
from .model import PrefixModel
from .progress import validations
from .search_page import write_search
from .search_space import SEARCHED, Space
from .study import FILE, Study, open_study, signature, storing
from .train import Say, TrainResult, build, encoded, load_rows, make_trainer, train

__all__ = ["SEARCHED", "SearchConfig", "SearchResult", "search"]

TRIALS = 12


@dataclass(frozen=True)
class SearchConfig:
    """What to search, and for how long.

    train: the settings of every trial; of those that are searched it holds the first trial's, the defaults.
    over: the settings that are searched, of `SEARCHED`.
    trials: how many are run to an end or pruned; 12 where no budget is given.
    minutes: after so many no trial begins; the first always does.
    """

    train: TrainConfig
    over: tuple[str, ...] = SEARCHED
    trials: int | None = None
    minutes: float | None = None

    @property
    def budget(self) -> int | None:
        return TRIALS if self.trials is None and self.minutes is None else self.trials

    def check(self) -> None:
        """Raise InputError for what cannot be meant."""
        self.train.check()
        if processes.count() > 1:
            raise InputError("a search runs in one process; start it without torchrun.")
        for name in ("trials", "minutes"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InputError(f"{name} must be above 0, not {value}.")
        unknown = [name for name in self.over if name not in SEARCHED]
        if unknown:
            raise InputError(f"{', '.join(unknown)} cannot be searched; choose among {', '.join(SEARCHED)}.")
        if self.train.prompt_tokens and "layers" in self.over:
            raise InputError("prompt tokens stand behind a prefix in every layer; search over the other settings.")


@dataclass(frozen=True)
class SearchResult:
    """`summary` is what trials.json holds; `winner` what the best's run found, None where it was tested before."""

    output: Path
    summary: dict[str, Any]
    winner: TrainResult | None


def search(config: SearchConfig, *, say: Say = lambda line: None) -> SearchResult:
    """Run trials until the budget is spent, then test the one of lowest validation loss and save it as OUTPUT/best.

    Goes on with the search that OUTPUT holds, if it does. `say` gets a line of news now and then. Raises InputError
    for what was given wrong, a search of other settings in OUTPUT among it; RunError when the work itself fails.
    """
    config.check()
    output = config.train.output
    data = load_rows(config.train)
    task = build(config.train, data)
    space = Space(config.train, config.over, task.model)
    encoded(task, data.train)  # what is wrong with template or rows is said before anything is written
    with _alone(output), storing(output):
        study = open_study(output, signature(config.train, data, task.model, space), space)
        runner = _Runner(config, space, data, task.model, study, say)
        while (left := _left(config, study)) is not None:
            runner.run(left)
        return _finish(config, space, study, say)


class _Runner:
    """Runs one trial after another on the rows and the base that were loaded once."""

    def __init__(
        self, config: SearchConfig, space: Space, data: Data, model: PrefixModel, study: Study, say: Say
    ) -> None:
        self.config, self.space, self.data, self.model, self.study, self.say = config, space, data, model, study, say

    def run(self, left: str) -> None:
        """The next trial, from its proposal to its end; only the checkpoints of the best so far are kept."""
        trial = self.study.propose(self.config.train.seed)
        folder = _folder(self.config, trial.number)
        shutil.rmtree(folder, ignore_errors=True)  # of a study that was copied without its trials, or changed by hand
        row = self._train(trial, folder, left)
        self.study.end(trial, row)
        self.say(f"Trial {trial.number}: {described(row)}")
        best = self.study.best
        for other in folder.parent.iterdir():
            if best is None or other.name != str(best["trial"]):
                shutil.rmtree(other)
        write_json(self.config.train.output / "trials.json", _summary(self.config, self.study))

    def _train(self, trial: Trial, folder: Path, left: str) -> dict[str, Any]:
        config = replace(self.space.settings(trial.params), output=folder)
        row = {"trial": trial.number, "state": "finished", **self.space.shown(trial.params)}
        task = build(config, self.data, self.model)
        (rows, _), (validation, _) = encoded(task, self.data.train), encoded(task, self.data.validation)
        claim(config, folder / "training")
        best = self.study.best
        heading = f"trial {left}" + (f", best validation loss {best['loss']:.4g}" if best else "")
        logs = self.config.train.output / files.LOGS / f"trial-{trial.number}"
        watch = {"heading": heading, "callbacks": [_Judge(trial)]}
        trainer = make_trainer(config, task, rows, validation, logs, **watch)
        try:
            trainer.train()
        except DivergedError:
            row["state"] = "diverged"
        except TrialPruned:
            row["state"] = "pruned"
        except RunError as error:
            if not trainer.interrupted:
                raise
            at = f"interrupted in trial {trial.number}"
            raise RunError(f"{at}; run the same command again to go on with the search") from error
        history = [entry for entry in validations(trainer.state.log_history) if isfinite(entry["loss"])]
        if row["state"] == "finished" and not history:
            row["state"] = "diverged"
        # As PrefixTrainer chooses: of equal steps the later.
        kept = min(history, key=lambda entry: (entry["loss"], -entry["step"]), default={})
        return {**row, **kept, "seconds": round(trainer.seconds, 1)}


class _Judge(TrainerCallback):
    """Reports each validation to the study and ends a trial that is worse than half of the others were there."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        self._trial.report((metrics or {})["eval_loss"], state.global_step)
        if state.global_step < state.max_steps and self._trial.should_prune():
            raise TrialPruned


def described(row: dict[str, Any]) -> str:
    """A trial in a line."""
    shown = f"{row['form']}, {row['length']} tokens, {row['start']}, {row['layers']}, {row['learning_rate']:.2g}"
    if "loss" not in row:
        return f"{shown}: {row['state']}"
    state = "" if row["state"] == "finished" else f", {row['state']}"
    return f"{shown}: validation loss {row['loss']:.4f} at step {row['step']}{state}"


def _left(config: SearchConfig, study: Study) -> str | None:
    """Which trial comes next, in words; None where the budget is spent."""
    done, minutes = len(study.rows), study.seconds / 60
    if config.budget is not None and done >= config.budget:
        return None
    if config.minutes is not None and minutes >= config.minutes:
        return None
    of = f" of {config.budget}" if config.budget is not None else ""
    spent = f", {minutes:.1f} of {config.minutes:g} minutes" if config.minutes is not None else ""
    return f"{done + 1}{of}{spent}"


def _finish(config: SearchConfig, space: Space, study: Study, say: Say) -> SearchResult:
    """Test and save the winner, unless that was done before."""
    output, best = config.train.output, study.best
    if best is None:
        raise RunError(f"no trial in {output} came to an end; search with lower learning rates or other rows.")
    place, winner = output / "best", None
    if study.tested != best["trial"]:
        winner = _finished(config, space, study, place, say)
        study.tested = best["trial"]
    shutil.rmtree(output / "trials", ignore_errors=True)
    summary = _summary(config, study) | {"test": files.read_header(place)["training"]["test"]}
    write_json(output / "trials.json", summary)
    write_search(output, summary)
    return SearchResult(output, summary, winner)


def _finished(config: SearchConfig, space: Space, study: Study, place: Path, say: Say) -> TrainResult:
    """The winner's run, ended: its checkpoints are there, or it is trained again to the same result."""
    assert study.best is not None
    number = study.best["trial"]
    kept = _folder(config, number)
    if kept.is_dir():
        shutil.rmtree(place, ignore_errors=True)
        kept.rename(place)
    settings = replace(space.settings(study.params(number)), output=place)
    resume = (place / "training").is_dir()
    if resume:
        claim(settings, place / "training")  # the rows may have moved since
    else:
        shutil.rmtree(place, ignore_errors=True)
    say(f"Testing trial {number}, the best of {len(study.rows)}.")
    return train(settings, resume=resume, say=say)


def _summary(config: SearchConfig, study: Study) -> dict[str, Any]:
    rows, best = study.rows, study.best
    return {
        "over": list(config.over),
        "trials": rows,
        "defaults": rows[0]["trial"],
        "best": None if best is None else best["trial"],
    }


def _folder(config: SearchConfig, number: int) -> Path:
    return config.train.output / "trials" / str(number)


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Hold the search's folder, against a second process that would take its trials for dead."""
    lock = output / "study.lock"
    found = set(output.iterdir()) - {lock} if output.is_dir() else {output} if output.exists() else set()
    if found and output / FILE not in found:
        raise InputError(f"{output} exists and holds no search; use another output, or remove it.")
    try:
        output.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=0):
            yield
    except Timeout as error:
        raise InputError(f"another process searches in {output}; wait for it, or use another output.") from error
