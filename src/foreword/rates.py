"""The learning rates of a run: the prefix's, and those of what is trained beside it.

docs/log.md has what they were found by.
"""

from __future__ import annotations

from .combine import LEARNING_RATE, PARTS
from .config import TrainConfig
from .model import PrefixModel
from .tasks import task_class
from .tasks.task import PrefixTask

LEARNING_RATES = {"direct": 2e-2, "projected": 1e-2, "mlp": 3e-4}
RATES_OF_KINDS = {"decoder": 1.0, "encoder": 3.0, "encoder-decoder": 3.0}  # what a form's rate is multiplied by


def learning_rate(config: TrainConfig, model: PrefixModel) -> float:
    """As given, or the default."""
    return config.learning_rate or default_learning_rate(config, model)


def default_learning_rate(config: TrainConfig, model: PrefixModel) -> float:
    """That of the form, which some tasks and kinds of base multiply; keys and values that were saved before train on as
    they are."""
    form = "direct" if config.start_from else config.prefix.form
    return LEARNING_RATES[form] * task_class(config.task).rate * RATES_OF_KINDS[model.kind]


def learning_rates(config: TrainConfig, task: PrefixTask) -> dict[str, float]:
    """Of what has a rate of its own, by a part of its parameters' names."""
    rates = {"head": head_learning_rate(config, task)} if task.head is not None else {}
    trained = [name for name, p in task.named_parameters() if p.requires_grad]
    for part in PARTS:
        if any(part in name for name in trained):
            rates[part] = config.parts_learning_rate or LEARNING_RATE
    if config.prompt_tokens:  # like `direct`, in deviations of the start
        rates[f".forms.{task.model.active}.change"] = LEARNING_RATES["direct"] * task.rate
    return rates


def head_learning_rate(config: TrainConfig, task: PrefixTask) -> float:
    return config.head_learning_rate or task.head_learning_rate
