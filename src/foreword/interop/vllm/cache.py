"""Where a prefix goes in a paged cache: slots of blocks, heads of ranks, layers by name. Numbers only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...errors import InputError

NULL_BLOCK = 0  # stands for blocks that a sliding window has passed


def slots(blocks: Sequence[int], block_size: int, start: int, stop: int) -> tuple[list[int], list[int]]:
    """Positions `start..stop-1` that have a place, and their slot numbers; what falls in the null block has none."""
    kept = [p for p in range(start, stop) if blocks[p // block_size] != NULL_BLOCK]
    return kept, [blocks[p // block_size] * block_size + p % block_size for p in kept]


def head_slice(heads: int, ranks: int, rank: int) -> slice:
    """The key-value heads that `rank` of `ranks` holds: a share of them, or one, where there are fewer than ranks.

    Raises InputError when neither divides the other.
    """
    if heads >= ranks and heads % ranks == 0:
        share = heads // ranks
        return slice(rank * share, (rank + 1) * share)
    if heads < ranks and ranks % heads == 0:
        head = rank // (ranks // heads)
        return slice(head, head + 1)
    raise InputError(f"{heads} key-value heads cannot be laid over {ranks} ranks.")


def layer_index(name: str) -> int:
    """The number in an attention layer's name (`model.layers.3.self_attn.attn`). Raises InputError without just one."""
    numbers = [int(part) for part in name.split(".") if part.isdecimal()]
    if len(numbers) != 1:
        raise InputError(f"the engine's layer {name} is not numbered as a decoder's layers are.")
    return numbers[0]


def in_order(names: Iterable[str]) -> list[str]:
    """The layers' names by number. Raises InputError unless they are numbered 0, 1, 2 and so on, each once."""
    ordered = sorted(names, key=layer_index)
    if not ordered or [layer_index(name) for name in ordered] != list(range(len(ordered))):
        raise InputError(
            "not every layer of this model keeps keys and values of its own (some share them, draft tokens or mix in "
            "another way), so a prefix cannot be served on it."
        )
    return ordered
