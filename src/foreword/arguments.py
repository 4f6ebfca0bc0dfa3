"""The settings of a training run in transformers' words."""

from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from foreword.errors import InputError

LOWER_IS_BETTER = ("loss", "error", "mse", "rmse", "mae", "perplexity")


def training_arguments(
    output_dir: str | Path,
    *,
    epochs: float,
    max_steps: int | None,
    batch_size: int,
    learning_rate: float,
    warmup_ratio: float,
    weight_decay: float,
    max_grad_norm: float,
    eval_steps: int | None,
    save_steps: int,
    seed: int,
    bf16: bool,
    gradient_accumulation: int,
    gradient_checkpointing: bool,
    schedule: str,
    report_to: str | list[str] = "none",
    metric: str = "loss",
) -> TrainingArguments:
    """The settings of a run in transformers' words.

    `eval_steps` None turns validation off: the last state is the result, otherwise the best one by `metric`.
    `max_steps` None lets `epochs` decide. Raises: InputError for a `warmup_ratio` outside 0 to 1.
    """
    if not 0 <= warmup_ratio < 1:  # transformers would read 1.0 as one step
        raise InputError(f"The warmup ratio must be at least 0 and below 1, not {warmup_ratio}.")
    args = TrainingArguments(
        output_dir=str(output_dir),
        num_train_epochs=epochs,
        max_steps=max_steps if max_steps is not None else -1,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation,
        learning_rate=learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=warmup_ratio,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        eval_strategy="steps" if eval_steps else "no",
        eval_steps=eval_steps,
        save_strategy="steps",
        save_steps=save_steps,
        save_total_limit=2,
        metric_for_best_model=metric if eval_steps else None,
        greater_is_better=not metric.endswith(LOWER_IS_BETTER) if eval_steps else None,
        restore_callback_states_from_checkpoint=True,
        seed=seed,
        data_seed=seed,
        bf16=bf16,
        use_cpu=not torch.accelerator.is_available(),  # else bf16 is refused on a CPU
        activation_checkpointing=gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        report_to=report_to,
        logging_steps=10,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_find_unused_parameters=False,
    )
    # Set afterwards: the constructor demands that save_steps be a multiple of eval_steps, which PrefixTrainer
    # does not need, as it saves each new best step.
    args.load_best_model_at_end = eval_steps is not None
    return args


def check_tracker(name: str) -> None:
    """Raise InputError for a tracker that transformers does not know, or whose package is not installed."""
    if name not in (*INTEGRATION_TO_CALLBACK, "none", "all"):
        raise InputError(f"report_to {name!r} is unknown; choose one of {', '.join(INTEGRATION_TO_CALLBACK)}.")
    # transformers does not list flyte among what is available, installed or not.
    if name not in (*get_available_reporting_integrations(), "flyte", "none", "all"):
        raise InputError(
            f"report_to {name!r} needs a package that is not installed; pip install {name}, or leave it out."
        )
