"""foreword: prefix-tuning. Teach one frozen language model many jobs, a small prefix of keys and values for each."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bases import load_base as load_base
    from .errors import ForewordError as ForewordError
    from .errors import InputError as InputError
    from .errors import RunError as RunError
    from .forms import PrefixConfig as PrefixConfig
    from .kv import KVPrefix as KVPrefix
    from .kv import SiteKV as SiteKV
    from .model import PrefixModel as PrefixModel
    from .tasks.answer import PrefixAnswerer as PrefixAnswerer
    from .tasks.classify import PrefixClassifier as PrefixClassifier
    from .tasks.generate import PrefixGenerator as PrefixGenerator
    from .tasks.label import PrefixLabeller as PrefixLabeller
    from .tasks.regress import PrefixRegressor as PrefixRegressor
    from .train import TrainConfig as TrainConfig
    from .trainer import PrefixTrainer as PrefixTrainer

__version__ = "0.1.0"

# Loaded when first used: the command line's --help must not wait for torch.
_HOMES = {
    "ForewordError": "errors",
    "InputError": "errors",
    "KVPrefix": "kv",
    "PrefixClassifier": "tasks.classify",
    "PrefixRegressor": "tasks.regress",
    "PrefixLabeller": "tasks.label",
    "PrefixGenerator": "tasks.generate",
    "PrefixAnswerer": "tasks.answer",
    "PrefixConfig": "forms",
    "PrefixModel": "model",
    "PrefixTrainer": "trainer",
    "RunError": "errors",
    "SiteKV": "kv",
    "TrainConfig": "train",
    "load_base": "bases",
}
__all__ = [*_HOMES, "load"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'foreword' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def load(directory: Any) -> Any:
    """A saved prefix on its base: with its task (a PrefixClassifier, ...) where it has one, else a PrefixModel."""
    from .files import read_header
    from .model import PrefixModel
    from .tasks import load_task

    return load_task(directory) if read_header(directory).get("task") else PrefixModel.from_pretrained(directory)
