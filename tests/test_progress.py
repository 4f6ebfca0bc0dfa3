"""What a run shows while it trains: the real command in a real pseudo-terminal, and what TensorBoard reads."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pyte
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from foreword import InputError, TrainConfig
from foreword.panel import sparkline
from foreword.train import train

ROWS, COLUMNS = 60, 100


def command(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    where = ["--model", str(model), "--data", str(data), "--output", str(output)]
    settings = "--epochs 6 --batch-size 4 --max-length 40 --save-steps 30 --no-zero-shot".split()
    return [sys.executable, "-m", "foreword", "train", *where, *settings, *more]


class Terminal:
    """A terminal of 100 columns that remembers every screen on which something changed."""

    def __init__(self) -> None:
        self.screen = pyte.Screen(COLUMNS, ROWS)
        self._stream = pyte.ByteStream(self.screen)
        self.raw, self.screens = b"", list[str]()

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def run(self, arguments: list[str], interrupt_at: str | None = None, **environment: str) -> int:
        """Run a process in it to its end, with one Ctrl-C as soon as `interrupt_at` is on the screen."""
        keyboard, end = pty.openpty()
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        own = {"OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "LANG": "C.UTF-8", **environment}
        process = subprocess.Popen(arguments, stdin=end, stdout=end, stderr=end, env=os.environ | own)
        os.close(end)
        while chunk := _read(keyboard):
            self.raw += chunk
            self._stream.feed(chunk)
            self.screens.append(self.text)
            if interrupt_at is not None and interrupt_at in self.text:
                process.send_signal(signal.SIGINT)
                interrupt_at = None
        os.close(keyboard)
        return process.wait()


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # how Linux says that the other end was closed
        return b""


def test_a_terminal_shows_a_live_panel_that_stays_as_it_ended(tiny_llama: Path, topics: Path, tmp_path: Path) -> None:
    terminal = Terminal()
    assert terminal.run(command(tiny_llama, topics, tmp_path / "p")) == 0
    panels = [screen for screen in terminal.screens if "training" in screen]
    assert any(" 0/96" in screen for screen in panels)
    assert len({found[0] for screen in panels if (found := re.search(r"\d+/96", screen))}) > 3
    final = terminal.text
    for fact in (
        r"training ━+ 96/96",
        r"loss +\d\.\d+ +[▁-█]{9,}",
        r"validation loss +\d\.\d+ +best \d\.\d+ at step \d+",
        r"validation accuracy +\d",
        r"learning rate +\d",
        r"rate +\d+\.\d rows/s +0:00:00 left",
        r"memory +\d\.\d\d GiB",
    ):
        assert len(re.findall(fact, final)) == 1, fact
    assert final.count("╭") == final.count("╰") == 1
    assert final.index("Prefix: ") < final.index("╭") < final.index("╰") < final.index("Testing on 8 rows.")
    assert terminal.raw.rindex(b"\x1b[?25h") > terminal.raw.rindex(b"\x1b[?25l")  # the cursor is back


def test_ctrl_c_is_answered_in_the_panel(tiny_llama: Path, topics: Path, tmp_path: Path) -> None:
    terminal = Terminal()
    long = command(tiny_llama, topics, tmp_path / "p", "--epochs", "2000")
    assert terminal.run(long, interrupt_at="rows/s") == 1
    final = terminal.text
    assert final.count("╭") == final.count("╰") == 1
    assert "│ stopping after this step; Ctrl-C again stops at once" in final
    assert final.splitlines()[-1].startswith("foreword: interrupted at step ")


@pytest.mark.slow
def test_a_search_shows_each_trial_s_panel_with_the_best_so_far(tiny_llama: Path, topics: Path, tmp_path: Path) -> None:
    terminal = Terminal()
    arguments = command(tiny_llama, topics, tmp_path / "s", "--trials", "2", "--epochs", "3", "--save-steps", "12")
    arguments[arguments.index("train")] = "tune"
    assert terminal.run(arguments) == 0
    assert any("╭─ trial 1 of 2 ─" in screen for screen in terminal.screens)
    second = r"╭─ trial 2 of 2, best validation loss 0\.\d+ ─[\s\S]*loss +\d\.\d+"
    assert any(re.search(second, screen) for screen in terminal.screens)
    before, after = terminal.text.split("Testing trial")
    assert "╭" not in before and "Trial 0: projected, 36 tokens, instruction, all, 0.01: validation loss" in before
    assert after.count("╭") == 1  # the winner's, which trains no further


def test_a_curve_in_blocks() -> None:
    assert sparkline([3.0, 2.0, 1.0]) == "█▅▁" or sparkline([3.0, 2.0, 1.0]) == "█▄▁"
    assert sparkline([1.0]) == "▁" and sparkline([2.0, 2.0]) == "▁▁"
    falling = sparkline([1 / (i + 1) for i in range(1000)])
    assert len(falling) == 24 and falling[0] == "█" and falling[-1] == "▁"


def test_tensorboard_reads_loss_metric_and_learning_rate(tiny_llama: Path, topics: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        output=tmp_path / "run",
        model=str(tiny_llama),
        data=str(topics),
        epochs=3,
        batch_size=8,
        max_length=40,
        zero_shot=False,
        warmup_ratio=0.1,
        report_to="tensorboard",
    )
    summary = train(config).summary
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        *("README.md", "prefix.json", "prefix.safetensors", "report.html", "tensorboard"),
    ]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    losses = {(event.step, round(event.value, 4)) for event in events.Scalars("train/loss")}
    assert losses == {(step, round(loss, 4)) for step, loss in summary["losses"]}
    validated = [(event.step, event.value) for event in events.Scalars("eval/accuracy")]
    assert validated == [(entry["step"], pytest.approx(entry["accuracy"])) for entry in summary["validations"]]
    rates = [event.value for event in events.Scalars("train/learning_rate")]
    assert len(rates) == len(losses) and max(rates) == pytest.approx(summary["learning_rate"], rel=0.2)


def test_a_tracker_that_is_unknown_or_not_installed_is_one_sentence(
    tiny_llama: Path, topics: Path, tmp_path: Path
) -> None:
    config = TrainConfig(output=tmp_path / "p", model=str(tiny_llama), data=str(topics), report_to="magic")
    with pytest.raises(InputError, match=r"report_to 'magic' is unknown; choose one of .*tensorboard"):
        train(config)
    missing = sorted({"wandb", "neptune", "mlflow", "swanlab"} - set(get_available_reporting_integrations()))[0]
    assert missing in INTEGRATION_TO_CALLBACK
    with pytest.raises(InputError, match=f"'{missing}' needs a package that is not installed; pip install {missing}"):
        train(TrainConfig(output=tmp_path / "p", model=str(tiny_llama), data=str(topics), report_to=missing))
    assert not (tmp_path / "p").exists()
