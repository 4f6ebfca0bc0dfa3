"""A search as a whole, on a tiny model: trials, pruning, budgets, kills, other searches, and the winner."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from conftest import interrupted_at_step
from safetensors.torch import load_file

from foreword import InputError, PrefixConfig, RunError, TrainConfig, cli, files
from foreword.search import SearchConfig, SearchResult, search
from foreword.search_space import SEARCHED
from foreword.train import train

SETTINGS: dict[str, Any] = {"max_steps": 8, "save_steps": 2, "batch_size": 4, "max_length": 40, "zero_shot": False}


def config(model: Path, data: Path, output: Path, trials: int | None = 3, **changes: Any) -> SearchConfig:
    return SearchConfig(TrainConfig(output, str(model), str(data), **(SETTINGS | changes)), trials=trials)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "prefix.safetensors")


def equal(a: Path, b: Path) -> bool:
    first, second = tensors(a), tensors(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def found(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The trials without what depends on the clock and on kills."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "trial")} for row in summary["trials"]]


@pytest.fixture(scope="module")
def three(tiny_llama: Path, topics: Path, tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    return search(config(tiny_llama, topics, tmp_path_factory.mktemp("search") / "three"))


@pytest.fixture(scope="module")
def searched(tiny_llama: Path, topics: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Seven trials, which TensorBoard logs, and the news they gave."""
    news: list[str] = []
    output = tmp_path_factory.mktemp("search") / "seven"
    return search(config(tiny_llama, topics, output, 7, report_to="tensorboard"), say=news.append), news


def test_trials_begin_with_the_defaults_and_the_lowest_loss_wins(searched: Any) -> None:
    result, news = searched
    rows = result.summary["trials"]
    assert [row["trial"] for row in rows] == list(range(7))
    first = {name: rows[0][name] for name in SEARCHED}
    assert first == {"form": "projected", "length": 36, "start": "instruction", "layers": "all", "learning_rate": 0.01}
    assert len({tuple(row[name] for name in SEARCHED) for row in rows}) == 7
    ended = [row for row in rows if row["state"] == "finished"]
    assert result.summary["best"] == min(ended, key=lambda row: row["loss"])["trial"]
    assert result.winner.summary["validation"] == min(row["loss"] for row in ended)
    assert [line.split(":")[0] for line in news if line.startswith("Trial ")] == [f"Trial {i}" for i in range(7)]


def test_poor_trials_are_pruned(searched: Any) -> None:
    rows = searched[0].summary["trials"]
    pruned = [row for row in rows if row["state"] == "pruned"]
    assert pruned and all(row["step"] < 8 for row in pruned)
    assert all(row["state"] == "finished" for row in rows[:3])


def test_a_search_leaves_the_winner_a_table_and_a_page(searched: Any) -> None:
    result, _ = searched
    assert sorted(p.name for p in result.output.iterdir() if p.name != "study.lock") == [
        *("best", "report.html", "study.db", "tensorboard", "trials.json"),
    ]
    logged = sorted(p.name for p in (result.output / "tensorboard").iterdir())
    assert logged == [f"trial-{i}" for i in range(7)]
    assert sorted(p.name for p in (result.output / "best").iterdir()) == [
        *("README.md", "prefix.json", "prefix.safetensors", "report.html", "tensorboard"),
    ]
    saved = json.loads((result.output / "trials.json").read_text())
    assert saved == result.summary
    assert saved["test"] == files.read_header(result.output / "best")["training"]["test"]
    page = (result.output / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 6 and page.count("<tr>") == 8 and 'href="best/report.html"' in page
    assert "http" not in page.replace("http://www.w3.org/", "").replace("https://www.w3.org/", "")


def test_the_winner_is_what_a_plain_run_with_its_settings_gives(
    searched: Any, tiny_llama: Path, topics: Path, tmp_path: Path
) -> None:
    result, _ = searched
    row = next(row for row in result.summary["trials"] if row["trial"] == result.summary["best"])
    layers = {"all": None, "lower": (0,), "upper": (1,)}[row["layers"]]
    prefix = PrefixConfig(form=row["form"], length=row["length"], start=row["start"], layers=layers)
    plain = config(tiny_llama, topics, tmp_path / "p", prefix=prefix, learning_rate=row["learning_rate"]).train
    summary = train(plain).summary
    assert equal(tmp_path / "p", result.output / "best")
    assert summary["test"] == result.summary["test"]
    assert result.winner.summary["seconds"]["training"] > 0


def test_an_equal_budget_tests_nothing_again_and_a_larger_one_adds_trials(
    three: SearchResult, searched: Any, tiny_llama: Path, topics: Path, tmp_path: Path
) -> None:
    shutil.copytree(three.output, tmp_path / "s")
    before = (tmp_path / "s" / "best" / "prefix.json").read_bytes()
    again = search(config(tiny_llama, topics, tmp_path / "s"))
    assert again.winner is None and again.summary == three.summary
    assert (tmp_path / "s" / "best" / "prefix.json").read_bytes() == before
    more = search(config(tiny_llama, topics, tmp_path / "s", 7))
    assert more.summary["trials"][:3] == three.summary["trials"]
    assert found(more.summary) == found(searched[0].summary)
    assert equal(tmp_path / "s" / "best", searched[0].output / "best")


def test_a_budget_in_minutes_always_runs_the_defaults(tiny_llama: Path, topics: Path, tmp_path: Path) -> None:
    timed = replace(config(tiny_llama, topics, tmp_path / "s", trials=None), minutes=1e-4)
    assert [row["trial"] for row in search(timed).summary["trials"]] == [0]
    longer = replace(timed, minutes=1e9, trials=2)
    assert len(search(longer).summary["trials"]) == 2


def test_what_is_given_is_not_searched(tiny_llama: Path, topics: Path, tmp_path: Path) -> None:
    prefix = PrefixConfig(form="projected", length=5)
    given = replace(config(tiny_llama, topics, tmp_path / "s", prefix=prefix), over=("start", "learning_rate"))
    rows = search(given).summary["trials"]
    assert {(row["form"], row["length"], row["layers"]) for row in rows} == {("projected", 5, "all")}
    assert len({row["learning_rate"] for row in rows}) == 3


def test_a_trial_that_diverges_is_a_bad_trial_and_not_the_end(tiny_llama: Path, topics: Path, tmp_path: Path) -> None:
    hot = replace(config(tiny_llama, topics, tmp_path / "s", 1, learning_rate=float("inf")), over=("start",))
    with pytest.raises(RunError, match=r"no trial in .* came to an end; search with lower learning rates"):
        search(hot)
    rows = json.loads((tmp_path / "s" / "trials.json").read_text())["trials"]
    assert [row["state"] for row in rows] == ["diverged"]
    assert not list((tmp_path / "s" / "trials").iterdir())


def command(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    where = ["--model", str(model), "--data", str(data), "--output", str(output)]
    settings = "--max-steps 8 --save-steps 2 --batch-size 4 --max-length 40 --no-zero-shot --trials 3".split()
    return [sys.executable, "-m", "foreword", "tune", *where, *settings, *more]


def test_the_command_prints_a_table_or_json(
    three: SearchResult,
    tiny_llama: Path,
    topics: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*more: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["foreword", *command(tiny_llama, topics, tmp_path / "s", *more)[3:]])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), *capsys.readouterr()

    shutil.copytree(three.output, tmp_path / "s")
    code, out, _ = run("--json")
    assert code == 0 and json.loads(out) == three.summary
    monkeypatch.setenv("COLUMNS", "120")
    code, out, _ = run()
    best = next(row for row in three.summary["trials"] if row["trial"] == three.summary["best"])
    assert code == 0 and f"{best['loss']:.4f}" in out
    assert re.search(r"The defaults won: no trial|beat the defaults: validation loss \d", out)
    code, _, err = run("--form", "mlp")
    assert code == 2 and "holds a search with another settings, search space" in err
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, _, err = run()
    assert (
        code == 2 and err == 'foreword: a search needs Optuna, which is not installed; pip install "foreword[tune]".\n'
    )


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    while not path.exists() and process.poll() is None:
        time.sleep(0.002)


@pytest.mark.parametrize(
    "where",
    [
        pytest.param("trials/0/training/checkpoint-4", marks=pytest.mark.slow),
        "trials/1/training/checkpoint-2",
        pytest.param("best", marks=pytest.mark.slow),
    ],
)
def test_a_killed_search_goes_on_and_finds_the_same(
    three: SearchResult, tiny_llama: Path, topics: Path, tmp_path: Path, where: str
) -> None:
    output = tmp_path / "s"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(tiny_llama, topics, output), stderr=subprocess.PIPE, env=environment)
    wait_for(output / where, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    resumed = search(config(tiny_llama, topics, output))
    assert found(resumed.summary) == found(three.summary)
    assert equal(output / "best", three.output / "best")
    assert not (output / "trials").exists()


def test_ctrl_c_says_how_to_go_on(
    tiny_llama: Path, topics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        interrupted_at_step(3, monkeypatch),
        pytest.raises(RunError, match=r"interrupted in trial 0; run the same command again to go on"),
    ):
        search(config(tiny_llama, topics, tmp_path / "s"))
    rows = search(config(tiny_llama, topics, tmp_path / "s", 1)).summary["trials"]
    assert [(row["trial"], row["learning_rate"]) for row in rows] == [(1, 0.01)]  # the defaults, again


def test_a_disk_that_is_full_is_one_sentence(tiny_llama: Path, topics: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    begun = config(tiny_llama, topics, tmp_path / "s", 2)

    def fill(line: str) -> None:
        if line.startswith("Trial 0"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))

    try:
        with pytest.raises(RunError, match=r"study.db could not be written \(.*\); run the same command again"):
            search(begun, say=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(search(begun).summary["trials"]) == 2


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seed": 1}, "another seed"),
        ({"batch_size": 8}, "another settings"),
        ({"train_rows": 32}, "another data, settings"),
        ({"prefix": PrefixConfig(length=3)}, "another settings, search space"),
    ],
)
def test_the_store_of_another_search_is_refused(
    searched: Any, tiny_llama: Path, topics: Path, change: dict[str, Any], sentence: str
) -> None:
    before = {path: path.read_bytes() for path in searched[0].output.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=f"holds a search with {sentence}; use another output, or remove it"):
        search(config(tiny_llama, topics, searched[0].output, trials=9, **change))
    assert {path: path.read_bytes() for path in searched[0].output.rglob("*") if path.is_file()} == before


def test_a_place_in_use_is_refused(tiny_llama: Path, topics: Path, tmp_path: Path) -> None:
    for name, content in (("thesis.txt", b"mine"), ("study.db", b"no database" * 1000)):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_bytes(content)
        with pytest.raises(InputError, match=r"holds no search|is not a study that can be read"):
            search(config(tiny_llama, topics, folder))
        assert (folder / name).read_bytes() == content
    (tmp_path / "other").mkdir()
    with closing(sqlite3.connect(tmp_path / "other" / "study.db")) as other:
        other.execute("create table mine (x)")
        with pytest.raises(InputError, match="is not a study that can be read"):
            search(config(tiny_llama, topics, tmp_path / "other"))
        assert other.execute("select name from sqlite_master").fetchall() == [("mine",)]
    (tmp_path / "theirs").mkdir()
    optuna.create_study(storage=f"sqlite:///{tmp_path}/theirs/study.db", study_name="theirs")
    with pytest.raises(InputError, match="holds other studies: theirs; use another output"):
        search(config(tiny_llama, topics, tmp_path / "theirs"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="holds no search"):
        search(config(tiny_llama, topics, tmp_path / "file"))


def test_a_second_process_on_the_same_search_is_refused(tiny_llama: Path, topics: Path, tmp_path: Path) -> None:
    from filelock import FileLock

    (tmp_path / "s").mkdir()
    with (
        FileLock(tmp_path / "s" / "study.lock"),
        pytest.raises(InputError, match=r"another process searches in .*s; wait for it"),
    ):
        search(config(tiny_llama, topics, tmp_path / "s"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"trials": 0}, "trials must be above 0, not 0"),
        ({"minutes": -1.0}, "minutes must be above 0, not -1.0"),
        ({"over": ("magic",)}, "magic cannot be searched; choose among form, length"),
    ],
)
def test_bad_settings_of_a_search_leave_nothing(
    tiny_llama: Path, topics: Path, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        search(replace(config(tiny_llama, topics, tmp_path / "s"), **changes))
    assert not (tmp_path / "s").exists()


def test_a_search_by_several_processes_is_refused(
    tiny_llama: Path, topics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="a search runs in one process; start it without torchrun"):
        search(config(tiny_llama, topics, tmp_path / "s"))
    assert not (tmp_path / "s").exists()
