"""Several processes that train one prefix together, as `torchrun` and `accelerate launch` start them.

Every process reads every batch and computes rows of its own, each n-th of n processes; the first one speaks and writes.
So what a batch holds and what its loss is divided by are those of one process, and need no exchange.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the command line asks who speaks, and must not wait for torch
    from torch import Tensor

SECONDS_FOR_THE_FIRST = 2.0


def index() -> int:
    """Which of the processes this is, from 0."""
    return int(os.environ.get("RANK", 0))


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def first() -> bool:
    """Whether this is the process that speaks and writes."""
    return index() == 0


def join() -> None:
    """Meet the other processes, over NCCL or, where there is no GPU, over gloo."""
    import torch
    from accelerate import PartialState

    PartialState(cpu=not torch.accelerator.is_available())


def wait() -> None:
    """Until every process is here."""
    from accelerate import PartialState

    PartialState().wait_for_everyone()


def sharding_asked() -> bool:
    """Whether `accelerate launch` was told to shard (FSDP); from here on it is ours to do.

    accelerate itself would shard the prefix too, and nothing at all on a CPU. Raises InputError for settings of its
    that are not kept.
    """
    from .errors import InputError

    def told(name: str) -> bool:
        return os.environ.get(name, "false").lower() in ("1", "true")

    if not told("ACCELERATE_USE_FSDP"):
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise InputError("a base is sharded by FSDP2 alone; set fsdp_version: 2 in accelerate's settings.")
    if told("FSDP_OFFLOAD_PARAMS"):
        raise InputError("a sharded base is not offloaded; set fsdp_offload_params: false in accelerate's settings.")
    if told("FSDP_ACTIVATION_CHECKPOINTING"):
        raise InputError("accelerate's settings ask for checkpointing; ask by --gradient-checkpointing alone.")
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    return True


def share(batch: dict[str, Any], rows: int) -> tuple[dict[str, Any], bool]:
    """This process's rows of a batch of `rows`, and whether there are any; a process that has none gets the first
    row, to run in step with the others."""
    import torch

    own = list(range(index(), rows, count()))
    taken = {
        name: value[own or [0]] if isinstance(value, torch.Tensor) and value.dim() and len(value) == rows else value
        for name, value in batch.items()
    }
    return taken, bool(own)


def joined(own: Tensor, rows: int) -> Tensor:
    """What all processes made of their `share` of `rows` rows, in the rows' order."""
    import torch
    from accelerate.utils import gather

    most = -(-rows // count())
    padded = torch.cat([own, own[:1].expand(most - len(own), *own.shape[1:])])
    everything = gather(padded.contiguous())
    return everything.unflatten(0, (count(), most)).transpose(0, 1).flatten(0, 1)[:rows]


def total(number: Tensor) -> Tensor:
    """The sum over the processes."""
    from accelerate.utils import reduce

    return reduce(number, reduction="sum")


def anywhere(flag: bool) -> bool:
    """Whether the flag is up in any process; all of them get the same answer."""
    if count() == 1:
        return flag
    import torch
    from accelerate import PartialState

    return bool(total(torch.tensor(float(flag), device=PartialState().device)) > 0)


def interleaved(own: Sequence[Any]) -> list[Any]:
    """Each process's list, put together so that every n-th thing is of the same process."""
    import torch.distributed

    everything: list[Any] = [None] * count()
    torch.distributed.all_gather_object(everything, list(own))
    return [everything[i % count()][i // count()] for i in range(sum(map(len, everything)))]


def complain(sentence: str, everywhere: bool = False) -> None:
    """Say what went wrong, once: a process that is not the first speaks only when its trouble is its own, which shows
    when it went wrong not `everywhere` and the first has not ended the run meanwhile."""
    if not first():
        if everywhere:
            return
        let_the_first_speak()
        sentence = f"process {index()}: {sentence}"
    print(f"foreword: {sentence}", file=sys.stderr, flush=True)


def let_the_first_speak() -> None:
    """Give the first process the time to end the run, and this one with it, by an error that may be the cause of this
    one's."""
    if not first():
        time.sleep(SECONDS_FOR_THE_FIRST)


def leave(code: int) -> None:
    """End this process. One of several ends hard, once the others are done: gloo's threads abort one run in ten when
    the interpreter takes them down."""
    if count() == 1:
        sys.exit(code)
    if code == 0 and "torch" in sys.modules:
        import torch.distributed

        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
