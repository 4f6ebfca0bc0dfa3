"""What a search chooses from: distributions for Optuna, and a proposal as the settings of a run.

    form           direct, projected, mlp
    length         4 to 64 virtual tokens, logarithmic; fewer where the base has no room for them
    start          instruction, vocabulary, random
    layers         all, the lower half of them, the upper half
    learning_rate  0.1 to 4 times the form's own, logarithmic, as the forms' own differ thirtyfold

Each range is widened to hold the default.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from .config import TrainConfig
from .errors import InputError
from .forms import FORMS
from .model import PrefixModel
from .rates import default_learning_rate, learning_rate
from .train import NAME

SEARCHED = ("form", "length", "start", "layers", "learning_rate")
STARTS = ("instruction", "vocabulary", "random")
LAYERS = ("all", "lower", "upper")  # the last two are halves
LENGTHS, RATES = (4, 64), (0.1, 4.0)


class Space:
    """The settings `over` which is searched, around those of `train`; `model` holds its prefix at the start.

    distributions: by the searched setting's name. defaults: the first trial, a value for each of them.
    """

    def __init__(self, train: TrainConfig, over: tuple[str, ...], model: PrefixModel) -> None:
        if "layers" in over and train.prefix.layers is not None:
            raise InputError("the prefix's layers are given; leave them out, or do not search over them.")
        self.train, self._model = train, model
        self._layers = max(Counter(site.kind for site in model.sites).values())
        length = model.form(NAME).length - train.prompt_tokens
        rate = learning_rate(train, model) / default_learning_rate(train, model)
        every: dict[str, tuple[Any, BaseDistribution]] = {
            "form": (train.prefix.form, CategoricalDistribution(FORMS)),
            "length": (length, _lengths(length, train.max_length, model.text_limit())),
            "start": (train.prefix.start or "instruction", CategoricalDistribution(STARTS)),
            "layers": ("all", CategoricalDistribution(LAYERS if self._layers > 1 else LAYERS[:1])),
            "learning_rate": (rate, FloatDistribution(min(RATES[0], rate), max(RATES[1], rate), log=True)),
        }
        self._fixed = {name: default for name, (default, _) in every.items() if name not in over}
        self.defaults = {name: every[name][0] for name in SEARCHED if name in over}
        self.distributions = {name: every[name][1] for name in SEARCHED if name in over}

    def settings(self, params: dict[str, Any]) -> TrainConfig:
        """The settings of the trial that has these values."""
        half = self._layers // 2
        layers = {"lower": tuple(range(half)), "upper": tuple(range(half, self._layers))}
        own: dict[str, Any] = {name: params[name] for name in ("form", "length", "start") if name in params}
        if "layers" in params:
            own["layers"] = layers.get(params["layers"])
        config = replace(self.train, prefix=replace(self.train.prefix, **own))
        if "learning_rate" not in params:
            return config
        return replace(config, learning_rate=params["learning_rate"] * default_learning_rate(config, self._model))

    def shown(self, params: dict[str, Any]) -> dict[str, Any]:
        """Every setting that could be searched, as people read it: the learning rate itself."""
        config = self.settings(params)
        return {**self._fixed, **params, "learning_rate": learning_rate(config, self._model)}


def _lengths(default: int, max_length: int, text_limit: int | None) -> IntDistribution:
    """`text_limit`: tokens of text that the base takes behind a prefix of the default length."""
    low, high = LENGTHS
    if text_limit is not None:
        high = min(high, default + text_limit - max_length)
    return IntDistribution(min(low, default), max(high, default), log=True)
