"""The options of a training run, which `train` and `tune` share."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import defaults


def training(
    output: Annotated[Path, typer.Option(help="Where the finished prefix goes.")],
    model: Annotated[str, typer.Option(help="Hub id or folder of the base.")] = defaults.MODEL,
    data: Annotated[
        str, typer.Option(help="Hub id, a csv, tsv, jsonl or parquet file, or a folder of them.")
    ] = defaults.DATA,
    task: Annotated[str, typer.Option(help="classify, generate, regress, label or answer.")] = "classify",
    text_column: Annotated[
        str | None, typer.Option(help="Column of the texts, or several with commas; found if not given.")
    ] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the labels; found if not given.")] = None,
    form: Annotated[str, typer.Option(help="projected, direct or mlp.")] = "projected",
    length: Annotated[
        int | None, typer.Option(help="Virtual tokens; by default the instruction's own length, else 16.")
    ] = None,
    start: Annotated[str | None, typer.Option(help="instruction, vocabulary or random.")] = None,
    instruction: Annotated[
        str | None,
        typer.Option(help="Text to start from; by default made from the label names or, for generate, the first rows."),
    ] = None,
    start_from: Annotated[
        str | None, typer.Option(help="A saved prefix to go on from, of this task or of one like it.")
    ] = None,
    dynamic: Annotated[
        str | None, typer.Option(help="low_rank, mixture or gates: each text changes its own prefix.")
    ] = None,
    sites: Annotated[
        str | None, typer.Option(help="Kinds of attention to enter: encoder,decoder,cross; all if not given.")
    ] = None,
    lora: Annotated[int, typer.Option(help="LoRA of this rank on the base, trained with the prefix; none at 0.")] = 0,
    adapters: Annotated[
        int, typer.Option(help="Adapters of this size beside each feed-forward, trained with the prefix; none at 0.")
    ] = 0,
    prompt_tokens: Annotated[
        int, typer.Option(help="So many trained input embeddings behind the prefix; none at 0.")
    ] = 0,
    gated: Annotated[
        bool, typer.Option("--gated", help="LoRA, adapters and prefix each under a gate from the input.")
    ] = False,
    head: Annotated[
        str, typer.Option(help="words, linear, or auto: linear for decoders, else words where labels have them.")
    ] = "auto",
    template: Annotated[str | None, typer.Option(help="What stands around {text}, {prompt}, ...")] = None,
    label_word: Annotated[
        list[str] | None, typer.Option(help="A label's word; once per label, in the labels' order.")
    ] = None,
    max_length: Annotated[int, typer.Option(help="Tokens of template and text; longer texts are cut.")] = 128,
    chat: Annotated[bool, typer.Option("--chat", help="generate: the base's own chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="generate: tokens of a completion.")] = 128,
    beams: Annotated[int, typer.Option(help="generate: beam search over so many in the test.")] = 1,
    stride: Annotated[int | None, typer.Option(help="answer: tokens that two windows share.")] = None,
    train_rows: Annotated[int | None, typer.Option(help="Train on so many rows.")] = None,
    validation_rows: Annotated[int | None, typer.Option(help="Validate on so many rows.")] = None,
    test_rows: Annotated[int | None, typer.Option(help="Test on so many rows.")] = None,
    epochs: Annotated[float, typer.Option()] = 1.0,
    max_steps: Annotated[int | None, typer.Option(help="Stop after so many steps.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows of a step, of all processes together.")] = 16,
    learning_rate: Annotated[float | None, typer.Option(help="By default that of the form.")] = None,
    schedule: Annotated[
        str, typer.Option(help="Of the learning rate: constant_with_warmup, or cosine or linear to nought.")
    ] = "constant_with_warmup",
    keep: Annotated[
        float, typer.Option(help="Stay near the base on texts of its own: their weight beside the task's loss, say 1.")
    ] = 0.0,
    patience: Annotated[int | None, typer.Option(help="Stop after so many validations without a better one.")] = None,
    save_steps: Annotated[int | None, typer.Option(help="Steps between checkpoints and validations.")] = None,
    gradient_accumulation: Annotated[int, typer.Option()] = 1,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Less memory, more time.")] = False,
    activation_cache: Annotated[
        float, typer.Option(help="GiB for what layers below the first that learns make of rows, for later epochs.")
    ] = 0.0,
    dtype: Annotated[str, typer.Option(help="Of the base: auto, float32 or bfloat16.")] = "auto",
    quantise: Annotated[str | None, typer.Option(help="The base to 4bit or 8bit, by bitsandbytes.")] = None,
    shard: Annotated[
        bool, typer.Option("--shard", help="Split the base's weights over the processes of torchrun (FSDP2).")
    ] = False,
    zero_shot: Annotated[bool, typer.Option(help="Also test the base without a prefix.")] = True,
    report_to: Annotated[str, typer.Option(help="A tracker of transformers: tensorboard, wandb, ...")] = "none",
    seed: Annotated[int, typer.Option(help="The same seed gives the same prefix.")] = 0,
) -> Any:
    """The `TrainConfig` that these options give; typer evaluates annotations, and that one would load torch."""
    from .. import processes
    from ..config import TrainConfig
    from ..errors import InputError
    from ..forms import PrefixConfig

    if dtype not in ("auto", "float32", "bfloat16"):
        raise InputError(f"dtype {dtype!r} is unknown; choose auto, float32 or bfloat16.")
    return TrainConfig(
        output=output,
        model=model,
        data=data,
        task=task,
        text_column=text_column,
        label_column=label_column,
        start_from=start_from,
        prefix=PrefixConfig(
            form=form,  # type: ignore[arg-type]
            length=length,
            start=start,  # type: ignore[arg-type]
            instruction=instruction,
            dynamic=dynamic,  # type: ignore[arg-type]
            sites=tuple(sites.split(",")) if sites is not None else None,  # type: ignore[arg-type]
        ),
        lora=lora,
        adapters=adapters,
        prompt_tokens=prompt_tokens,
        gated=gated,
        head=head,  # type: ignore[arg-type]
        template=template,
        label_words=tuple(label_word) if label_word else None,
        max_length=max_length,
        chat=chat,
        max_new_tokens=max_new_tokens,
        beams=beams,
        stride=stride,
        train_rows=train_rows,
        validation_rows=validation_rows,
        test_rows=test_rows,
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        schedule=schedule,
        patience=patience,
        keep=keep,
        save_steps=save_steps,
        gradient_accumulation=gradient_accumulation,
        gradient_checkpointing=gradient_checkpointing,
        activation_cache=activation_cache,
        dtype=dtype,  # type: ignore[arg-type]
        quantise=quantise,  # type: ignore[arg-type]
        shard=shard or processes.sharding_asked(),
        zero_shot=zero_shot,
        report_to=report_to,
        seed=seed,
    )


def read_tasks(path: Path, output: Path) -> Any:
    """The `JointConfig` of a TOML file: options of training for all tasks, a table per task, perhaps one `shared`.

    Raises InputError for what is no TOML or no option.
    """
    from ..errors import InputError
    from ..joint import SHARED, JointConfig

    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"there is no file {path}; name a TOML file with a table per task.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid TOML ({error}); correct it.") from None
    tables = {name: value for name, value in given.items() if isinstance(value, dict)}
    usual = {name: value for name, value in given.items() if name not in tables}
    ratios = {name: table.pop("ratio") for name, table in tables.items() if "ratio" in table}
    for name, ratio in ratios.items():
        if not isinstance(ratio, int | float) or isinstance(ratio, bool):
            raise InputError(f"{path}, [{name}]: ratio {ratio!r} is no number; give one above 0.")
    shared = tables.pop(SHARED, None)
    return JointConfig(
        output,
        {name: _read_options({**usual, **table}, output / name, f"{path}, [{name}]") for name, table in tables.items()},
        ratios,
        None if shared is None else _read_options(shared, output, f"{path}, [{SHARED}]").prefix,
    )


def _read_options(options: dict[str, Any], output: Path, place: str) -> Any:
    """The TrainConfig of options by name. Raises InputError naming the place of what is wrong."""
    from ..errors import InputError

    arguments = ["--output", str(output)]
    for name, value in options.items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(option if value else option.replace("--", "--no-", 1))
        else:
            for each in value if isinstance(value, list) else [value]:
                arguments += [option, str(each)]
    app = typer.Typer(add_completion=False)
    app.command()(training)
    try:
        return typer.main.get_command(app).main(arguments, place, standalone_mode=False)
    except Exception as error:
        message = getattr(error, "format_message", None)  # an error of click, wherever typer has it from
        if message is None:
            raise
        raise InputError(f"{place}: {message()} Its keys are options of foreword train.") from None


def with_training(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, with the options of `training` in place of its parameter `config`, which gets what they give."""
    shared = _parameters(training)
    own = {name: parameter for name, parameter in _parameters(command).items() if name != "config"}

    @wraps(command)
    def read(**given: Any) -> None:
        config = training(**{name: given[name] for name in shared})
        command(config=config, **{name: given[name] for name in own})

    read.__signature__ = Signature([*shared.values(), *own.values()])  # type: ignore[attr-defined]  # typer reads it
    return read


def _parameters(function: Callable[..., Any]) -> dict[str, Parameter]:
    # By keyword, since those of two functions cannot be ordered with their defaults last.
    found = signature(function, eval_str=True).parameters
    return {name: parameter.replace(kind=Parameter.KEYWORD_ONLY) for name, parameter in found.items()}


def given(context: typer.Context) -> list[str]:
    """Names of the options that stand on the command line."""
    source = context.get_parameter_source
    return [name for name in context.params if source(name).name == "COMMANDLINE"]  # type: ignore[union-attr]
