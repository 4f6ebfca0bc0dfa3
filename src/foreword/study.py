"""Optuna's study of one search, in a SQLite file: proposals, pruning, and going on after a kill."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import distribution_to_json
from optuna.exceptions import StorageInternalError
from optuna.pruners import MedianPruner
from optuna.samplers import TPESampler
from optuna.trial import Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from .config import TrainConfig
from .data import Data
from .errors import InputError, RunError
from .model import PrefixModel
from .search_space import Space

FILE, NAME = "study.db", "foreword"
RANDOM_TRIALS = 5  # before TPE proposes
UNPRUNED_TRIALS = 3  # that came to an end, before one is pruned
# Where a search is written, and who watches, does not change what it finds; the rest is told by other parts.
UNSIGNED = ("output", "report_to", "data", "model", "task", "seed")


def signature(train: TrainConfig, data: Data, model: PrefixModel, space: Space) -> dict[str, Any]:
    """What makes two searches the same: rows, base, task, seed, settings and search space."""
    digest = hashlib.sha256()
    for row in (data.labels, *data.train, *data.validation, *data.test):
        digest.update(repr(row).encode())
    settings = {name: value for name, value in asdict(train).items() if name not in UNSIGNED}
    return {
        "data": digest.hexdigest(),
        "model": model.fingerprint,
        "task": train.task,
        "seed": train.seed,
        "settings": repr(settings),
        "search space": {name: distribution_to_json(one) for name, one in space.distributions.items()},
    }


def open_study(output: Path, own: dict[str, Any], space: Space) -> Study:
    """The study in `output`, new or as it was left; trials that a kill cut off are to be run again.

    Raises InputError where `own`, its signature, is not the one in the file, or the file is no study.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = output / FILE
    try:
        names = _studies(path.resolve())
        if names not in ([], [NAME]):
            raise InputError(f"{path} holds other studies: {', '.join(names)}; use another output, or remove it.")
        study = optuna.create_study(
            storage=f"sqlite:///{path.resolve()}",
            study_name=NAME,
            load_if_exists=True,
            pruner=MedianPruner(n_startup_trials=UNPRUNED_TRIALS),
        )
    except (sqlite3.Error, SQLAlchemyError, RuntimeError) as error:
        raise InputError(f"{path} is not a study that can be read; use another output, or remove it.") from error
    found = study.user_attrs.get("signature")
    if found is None and not study.trials:
        study.enqueue_trial(space.defaults)
        study.set_user_attr("signature", own)
        found = own
    differing = [name for name in own if (found or {}).get(name) != own[name]]
    if differing:
        raise InputError(
            f"{output} holds a search with another {', '.join(differing)}; use another output, or remove it."
        )
    _retry(study)
    return Study(study, space)


@contextmanager
def storing(output: Path) -> Iterator[None]:
    """Turn what the storage raises into one sentence."""
    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        reason = getattr(error.__cause__ or error, "orig", None) or error
        raise RunError(f"{output / FILE} could not be written ({reason}); run the same command again.") from error


def _studies(path: Path) -> list[str]:
    """Names of the studies in a file, before Optuna would make its tables in a database that is someone else's."""
    if not path.exists():
        return []
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
        tables = [name for (name,) in database.execute("select name from sqlite_master where type = 'table'")]
        return [name for (name,) in database.execute("select study_name from studies")] if tables else []


def _retry(study: optuna.Study) -> None:
    """Mark trials that were cut off as failed and have their values tried again."""
    again = {trial.user_attrs.get("again") for trial in study.trials}
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        if trial.number not in again:  # killed between the next two lines, it would be twice
            fixed = trial.system_attrs.get("fixed_params", {})
            study.enqueue_trial({**fixed, **trial.params}, user_attrs={"again": trial.number})
        study.tell(trial.number, state=TrialState.FAIL)


class Study:
    """The trials of a search. A row is what is known of one: number, state, settings, figures."""

    def __init__(self, study: optuna.Study, space: Space) -> None:
        self._study, self._space = study, space

    def propose(self, seed: int) -> Trial:
        """The next trial. What is proposed depends on the seed and the finished trials alone, so that a search that
        was killed proposes what it would have."""
        self._study.sampler = TPESampler(seed=seed + len(self.rows), n_startup_trials=RANDOM_TRIALS)
        return self._study.ask(self._space.distributions)

    def end(self, trial: Trial, row: dict[str, Any]) -> None:
        """Write down what a trial found; only one that was neither pruned nor diverged can win."""
        trial.set_user_attr("row", row)
        if row["state"] == "finished":
            self._study.tell(trial, row["loss"])
        else:
            self._study.tell(trial, state=TrialState.PRUNED)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The trials that count against the budget: ended, pruned or diverged."""
        return [trial.user_attrs["row"] for trial in self._done()]

    @property
    def seconds(self) -> float:
        """That these trials took."""
        return sum(trial.duration.total_seconds() for trial in self._done() if trial.duration)

    @property
    def best(self) -> dict[str, Any] | None:
        """The row of the trial of lowest loss, of equal ones the earliest."""
        ended = [row for row in self.rows if row["state"] == "finished"]
        return min(ended, key=lambda row: (row["loss"], row["trial"]), default=None)

    def params(self, number: int) -> dict[str, Any]:
        """The values that a trial had."""
        return self._study.trials[number].params

    @property
    def tested(self) -> int | None:
        """The number of the trial that was tested last."""
        return self._study.user_attrs.get("tested")

    @tested.setter
    def tested(self, number: int) -> None:
        self._study.set_user_attr("tested", number)

    def _done(self) -> list[optuna.trial.FrozenTrial]:
        return self._study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))
