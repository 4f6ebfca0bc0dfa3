"""Combinations: LoRA (by PEFT) and parallel adapters on the base that prefixes enter, and a gate per part.

    lora     W x + (alpha / r) B A x                         Hu et al. 2021 (arXiv:2106.09685, section 4.1)
    adapter  FFN(x) + W_up relu(W_down x)                    He et al. 2021 (arXiv:2110.04366, section 3.3): with a
                                                             prefix this is their MAM adapter
    gated    the change of a part times 2 sigmoid(g x_t)     Mao et al. 2021 (arXiv:2110.07577, section 3.2), here per
                                                             token, so that no token's gate depends on later ones

Each starts as no change. They belong to the base, not to one prefix: every prefix of the bank is read with them, and
they are saved with each (`prefix.json` says so under `combined`). The prefix's own gate is `dynamic="gates"`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import InputError
from .model import PrefixModel
from .sites import Site

ADAPTER = "default"  # PEFT's name of the only one
LEARNING_RATE = 1e-3  # of LoRA, adapters and their gates
PARTS = ("lora_", ".parts.")  # what the names of their parameters contain


class TokenGate(nn.Module):
    """2 sigmoid(g x) per token, 1 at first."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return 2 * torch.sigmoid(x.float() @ self.weight)[..., None].to(x.dtype)


class ParallelAdapter(nn.Module):
    """W_up relu(W_down x), nought at first, beside a feed-forward module."""

    def __init__(self, width: int, size: int, gated: bool) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, size), nn.Linear(size, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.gate = TokenGate(width) if gated else None
        self.is_read = True

    def forward(self, x: Tensor) -> Tensor:
        change = self.up(torch.relu(self.down(x.to(self.down.weight.dtype)))).to(x.dtype)
        return change if self.gate is None else change * self.gate(x)


def add_lora(model: PrefixModel, *, gated: bool = False, **settings: Any) -> None:
    """Put LoRA on the base; `settings` are those of PEFT's LoraConfig. Trained together with what else is trainable.

    Raises InputError where PEFT is missing, its settings do not fit, or the base has LoRA already, merged or not.
    """
    peft = _peft()
    layers = lora_layers(model)
    if settings.get("r", 1) < 1:
        raise InputError(f"the rank of LoRA must be at least 1, not {settings['r']}.")
    if any(layer.merged for layer in layers):
        raise InputError("the base's LoRA is merged already; load the base afresh before adding another.")
    if layers:
        raise InputError("the base has LoRA already; load the base afresh to add another.")
    try:
        peft.inject_adapter_in_model(peft.LoraConfig(**settings), model.base, ADAPTER)
    except (TypeError, ValueError) as error:
        raise InputError(f"LoRA cannot be put on this base: {str(error).splitlines()[0]}") from error
    for parameter in lora_parameters(model).values():  # PEFT makes them in the base's dtype, and they are trained
        parameter.data = parameter.data.float()
    if gated:
        gates = []
        for layer in lora_layers(model):
            gates.append(TokenGate(layer.in_features).to(model.device))
            # B is linear, so a gate of A x is one of B A x.
            layer.lora_A[ADAPTER].register_forward_hook(_gated(gates[-1]))
        model.parts["lora_gates"] = nn.ModuleList(gates)
    model.combined["lora"] = {**settings, "gated": gated}


def _gated(gate: TokenGate) -> Any:
    return lambda module, args, output: output * gate(args[0])


def merge_lora(model: PrefixModel) -> None:
    """Add LoRA into the base's weights, which makes it free; prefixes stay, and what is saved is not merged.

    Raises InputError where there is none, it is merged already, or gates make it depend on the token.
    """
    layers = lora_layers(model)
    if not layers:
        raise InputError("the base has no LoRA to merge.")
    if any(layer.merged for layer in layers):
        raise InputError("the base's LoRA is merged already.")
    if "lora_gates" in model.parts:
        raise InputError("gated LoRA differs from token to token and cannot be merged.")
    for layer in layers:
        layer.merge()


def lora_layers(model: PrefixModel) -> list[Any]:
    """The modules that PEFT put LoRA into."""
    return [module for module in model.base.modules() if hasattr(module, "lora_A") and hasattr(module, "merge")]


def lora_parameters(model: PrefixModel) -> dict[str, nn.Parameter]:
    """LoRA's parameters by their names in the base."""
    return {name: p for name, p in model.base.named_parameters() if ".lora_" in name}


@contextmanager
def apart(model: PrefixModel) -> Iterator[None]:
    """While open, the base is read without its LoRA and adapters, as it was before they were put on it.

    Raises InputError where LoRA is merged into it.
    """
    layers: list[Any] = lora_layers(model)
    adapters = [module for module in model.parts.modules() if isinstance(module, ParallelAdapter)]
    if any(layer.merged for layer in layers):
        raise InputError("LoRA is merged into the base, which cannot be read without it; load the directory again.")
    scales = [layer.scaling[ADAPTER] for layer in layers]
    try:
        for layer in layers:
            layer.scaling[ADAPTER] = 0.0
        for adapter in adapters:
            adapter.is_read = False
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling[ADAPTER] = scale
        for adapter in adapters:
            adapter.is_read = True


def add_adapters(model: PrefixModel, *, size: int = 16, gated: bool = False) -> None:
    """Put an adapter of `size` beside every layer's feed-forward module, which is found by where it is.

    Raises InputError where there are adapters already, or the feed-forward of a layer is not one module.
    """
    if "adapters" in model.parts:
        raise InputError("the base has adapters already; load the base afresh to add others.")
    if size < 1:
        raise InputError(f"the size of adapters must be at least 1, not {size}.")
    modules = [_feed_forward(model, site) for site in model.sites if site.kind != "cross"]
    embeddings: Any = model.base.get_input_embeddings()
    width, adapters = embeddings.weight.shape[1], []
    for module in modules:
        adapters.append(ParallelAdapter(width, size, gated).to(model.device))
        _beside(module, adapters[-1])
    model.parts["adapters"] = nn.ModuleList(adapters)
    model.combined["adapters"] = {"size": size, "gated": gated}


def _beside(module: nn.Module, adapter: ParallelAdapter) -> RemovableHandle:
    return module.register_forward_hook(
        lambda _, args, output: output + adapter(args[0]) if adapter.is_read else output
    )


def _feed_forward(model: PrefixModel, site: Site) -> nn.Module:
    """The module next to the attention, as near as possible, that has matrices of its own and no attention."""
    names = {other.name for other in model.sites}
    layers = {other.name for other in model.sites if other.kind != "cross"}
    at = site.name
    while "." in at:
        at = at.rsplit(".", 1)[0]
        if sum(name.startswith(f"{at}.") for name in layers) > 1:
            break
        for name, child in model.base.get_submodule(at).named_children():
            inside = any(f"{other}.".startswith(f"{at}.{name}.") for other in names)
            if not inside and sum(p.dim() == 2 and "lora_" not in n for n, p in child.named_parameters()) >= 2:
                return child
    raise InputError(
        f"the feed-forward of {type(model.base).__name__} beside {site.name} is not one module, so no adapter can "
        "stand beside it; use add_lora."
    )


def count(model: PrefixModel) -> int:
    """Numbers in LoRA, adapters and their gates."""
    return sum(p.numel() for p in [*model.parts.parameters(), *lora_parameters(model).values()])


# ---- files


def tensors(model: PrefixModel) -> dict[str, Tensor]:
    """What is saved of the parts: LoRA's and the adapters' parameters."""
    lora = {f"combined.base.{name}": p for name, p in lora_parameters(model).items()}
    return {**lora, **{f"combined.{name}": tensor for name, tensor in model.parts.state_dict().items()}}


@torch.no_grad()
def restore(model: PrefixModel, combined: dict[str, Any], saved: dict[str, Tensor], trainable: bool) -> None:
    """Put the parts of a saved directory on a base that has none.

    Raises InputError where the base has parts of its own, or the saved ones do not fit their settings.
    """
    if model.combined:
        raise InputError("this base has LoRA or adapters already; load the directory on a base of its own.")
    if model.forms:
        raise InputError(
            "the directory brings LoRA or adapters, and the prefixes that are here were trained without them; load it "
            "on a base of its own."
        )
    if "lora" in combined:
        add_lora(model, **combined["lora"])
    if "adapters" in combined:
        add_adapters(model, **combined["adapters"])
    own = tensors(model)
    found = {name: tensor for name, tensor in saved.items() if name.startswith("combined.")}
    if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in found.items()}:
        raise InputError("the saved combination is damaged: its tensors have not the shapes that its header says.")
    for name, tensor in own.items():
        tensor.copy_(found[name])
    for parameter in [*model.parts.parameters(), *lora_parameters(model).values()]:
        parameter.requires_grad_(trainable)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise InputError("LoRA needs PEFT; pip install 'foreword[lora]'.") from error
    return peft
