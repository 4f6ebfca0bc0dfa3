"""The script that everyone copies runs as written, on folders."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent


def test_ag_news_llama_trains_evaluates_saves_and_checkpoints_without_the_base(
    tiny_llama: Path, topics: Path, tmp_path: Path
) -> None:
    script = [sys.executable, str(ROOT / "examples" / "ag_news_llama.py")]
    where = ["--model", str(tiny_llama), "--data", str(topics), "--output", str(tmp_path / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [*script, *where, "--epochs", "4", "--max-length", "40"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    figures = dict(line.split(": ") for line in done.stdout.splitlines() if line.startswith("eval_"))
    assert 0 <= float(figures["eval_accuracy"]) <= 1 and {"eval_precision", "eval_recall", "eval_f1"} <= figures.keys()
    assert done.stdout.splitlines()[-2] in ("animal", "tool")
    assert (tmp_path / "out" / "prefix.safetensors").is_file()
    (checkpoint,) = sorted((tmp_path / "out-checkpoints").glob("checkpoint-*/model.safetensors"))[-1:]
    assert not any("base." in name for name in load_file(checkpoint))
