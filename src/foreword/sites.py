"""Sites: the attention modules of a model, found by running it, and what they make of hidden states and of text.

No table of model names: one small forward pass under `prefix_attention` reports every attention module in order, with
its heads, sizes and window. Keys and values of hidden states come from calling the module itself, so its projections,
biases, norms and rotation are the model's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .attention import NAME, listening
from .errors import InputError
from .kv import KVPrefix, SiteKV

Kind = Literal["decoder", "encoder", "cross"]
# What cross-attention modules call the source of their keys.
SOURCES = ("key_value_states", "encoder_hidden_states")
EXACT = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Site:
    """One attention module: where it is, what it is, and the shape of its keys and values."""

    name: str
    module: nn.Module = field(repr=False)
    kind: Kind
    kv_heads: int
    key_size: int
    value_size: int
    window: int | None

    def nothing(self, base: PreTrainedModel) -> SiteKV:
        """A prefix without tokens."""
        keys, values = (torch.zeros(1, self.kv_heads, 0, n) for n in (self.key_size, self.value_size))
        return SiteKV(keys.to(base.device, base.dtype), values.to(base.device, base.dtype))


@dataclass
class Capture:
    """What a forward pass of P tokens showed at each site: the finished keys and values, and what they came from.

    `hidden` holds `[1, P, d]`, the input of each site's key and value projections; `calls` the arguments of its
    forward, with which other hidden states at the same positions can be projected.
    """

    kv: KVPrefix
    hidden: dict[str, Tensor]
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]]
    shared: dict[str, str] = field(default_factory=dict)  # sites that read an earlier site's keys and values

    def of(self, sites: list[Site]) -> Capture:
        """What of it is of these sites."""
        kv = KVPrefix({site.name: self.kv.sites[site.name] for site in sites})
        return Capture(kv, self.hidden, self.calls, self.shared)


def implementations(base: PreTrainedModel) -> list[tuple[Any, str | None]]:
    """Every config in the base, with the attention that it names."""
    configs: dict[int, Any] = {id(m.config): m.config for m in base.modules() if hasattr(m, "config")}
    return [(c, c._attn_implementation_internal) for c in configs.values() if hasattr(c, "_attn_implementation")]


@contextmanager
def routed(base: PreTrainedModel, to: list[tuple[Any, str | None]] | None = None) -> Iterator[None]:
    """While open, the base's attention and its masks go through `prefix_attention` and `prefix_mask`, or back to
    where `to`, an earlier `implementations`, says."""
    saved = implementations(base)
    for config, implementation in to if to is not None else [(c, NAME) for c, _ in saved]:
        config._attn_implementation_internal = implementation
    try:
        yield
    finally:
        for config, implementation in saved:
            config._attn_implementation_internal = implementation


def run_inputs(base: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """The arguments that run `ids` `[1, P]` through every site; an encoder-decoder's decoder reads them too."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if base.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    else:
        inputs["use_cache"] = False  # type: ignore[assignment]
    return inputs


def find_sites(base: PreTrainedModel) -> list[Site]:
    """Every site of `base`, in the order in which the model runs them.

    Raises InputError naming the reason when the model's attention cannot be entered exactly: it is not routed through
    transformers' attention interface, some layers mix tokens in another way, or its scores hold something that
    `prefix_attention` does not know.
    """
    seen: dict[int, tuple[nn.Module, Tensor, Tensor, dict[str, Any]]] = {}

    def listener(module: nn.Module, key: Tensor, value: Tensor, arguments: dict[str, Any]) -> None:
        seen.setdefault(id(module), (module, key, value, arguments))

    inputs = probe_inputs(base)
    with evaluating(base), torch.no_grad():
        expected = first_output(base(**inputs))
        try:
            with routed(base), listening(listener):
                found = first_output(base(**inputs))
        except Exception:  # its own code may trip over the mask; if it called nothing of ours, that is said below
            if seen:
                raise
    family = type(base).__name__
    if not seen:
        raise InputError(
            f"{family} does not route its attention through transformers' attention interface, so a prefix cannot "
            "enter it; choose another model."
        )
    names = {id(module): name for name, module in base.named_modules()}
    source_length = inputs["input_ids"].shape[1]
    sites = [_site(base, names[i], source_length, *rest) for i, rest in seen.items()]
    _check_every_layer(base, family, sites)
    rounded = not all(p.dtype in EXACT for p in base.parameters())
    same = _close(expected, found, 1e-1 if expected.dtype not in EXACT else 1e-3)
    if not same and not (rounded and _same_site_by_site(base, sites, inputs)):
        raise InputError(
            f"the attention of {family} does something that foreword does not know (its outputs differ by "
            f"{float((expected - found).abs().max()):.2g} without any prefix), so a prefix would be wrong there."
        )
    return sites


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether two outputs are the same but for rounding."""
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(a.abs().max()))


def _same_site_by_site(base: PreTrainedModel, sites: list[Site], inputs: dict[str, Tensor]) -> bool:
    """Whether every site does with `prefix_attention` what it does without it, given the same hidden states.

    At the end of a quantised base in bfloat16 a rounding in its first layers can have become anything, on tokens that
    it never saw; at a site it stays below 2 %.
    """
    given: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    outputs: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = {k: kwargs[k] for k in ("hidden_states", *SOURCES) if isinstance(kwargs.get(k), Tensor)}
        first, named = given.setdefault(module, (args[:1], hidden))
        return (*first, *args[1:]), {**kwargs, **named}

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as stack:
        for site in sites:
            stack.callback(site.module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(site.module.register_forward_hook(after).remove)
        with evaluating(base), torch.no_grad():
            base(**inputs)
            with routed(base):
                base(**inputs)
    half = len(outputs) // 2
    return all(_close(a, b, 3e-2) for a, b in zip(outputs[:half], outputs[half:], strict=True))


def probe_inputs(base: PreTrainedModel) -> dict[str, Tensor]:
    """A few tokens; a decoder behind an encoder gets fewer, so that cross-attention shows by its keys' length."""
    ids = (torch.arange(5, 12, device=base.device) % vocabulary_size(base))[None]
    inputs = run_inputs(base, ids)
    if base.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :4]
    return inputs


def vocabulary_size(base: PreTrainedModel) -> int:
    """Rows of the input embeddings."""
    embeddings: Any = base.get_input_embeddings()
    return embeddings.weight.shape[0]


def _site(
    base: PreTrainedModel,
    name: str,
    source_length: int,
    module: nn.Module,
    key: Tensor,
    value: Tensor,
    arguments: dict[str, Any],
) -> Site:
    window = arguments.get("sliding_window") or getattr(module, "sliding_window", None)
    return Site(
        name=name,
        module=module,
        kind=_kind(base, module, key.shape[2] == source_length),
        kv_heads=key.shape[1],
        key_size=key.shape[3],
        value_size=value.shape[3],
        window=window if isinstance(window, int) else None,
    )


def _kind(base: PreTrainedModel, module: nn.Module, reads_source: bool) -> Kind:
    if not base.config.is_encoder_decoder:
        return "decoder" if getattr(module, "is_causal", True) else "encoder"
    if any(m is module for m in base.get_encoder().modules()):
        return "encoder"
    return "cross" if reads_source else "decoder"


def layer_of(base: nn.Module, site: str) -> tuple[nn.ModuleList, int] | None:
    """The list of layers that a site is in, and the place of its layer there."""
    parts = site.split(".")
    for end in range(len(parts), 0, -1):
        layers = base.get_submodule(".".join(parts[: end - 1]))
        if isinstance(layers, nn.ModuleList):
            return layers, int(parts[end - 1])
    return None


def _check_every_layer(base: PreTrainedModel, family: str, sites: list[Site]) -> None:
    layers = base.config.get_text_config().num_hidden_layers
    entered = sum(site.kind != "cross" for site in sites)
    if entered < layers:
        raise InputError(
            f"only {entered} of the {layers} layers of {family} mix tokens by attention that a prefix can enter "
            "(the rest are recurrent, convolutional or of another kind); choose a model with attention in every layer."
        )


@contextmanager
def evaluating(base: nn.Module) -> Iterator[None]:
    """Evaluation mode while open, and the mode of every module restored after."""
    modes = [(module, module.training) for module in base.modules()]
    base.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def first_output(output: Any) -> Tensor:
    """Logits, or the hidden states of a base without a head."""
    logits = getattr(output, "logits", None)
    return logits if logits is not None else output[0]


def capture(base: PreTrainedModel, sites: list[Site], ids: Tensor) -> Capture:
    """Run token ids `[1, P]` and keep each site's keys, values, and the hidden states they came from. No gradient."""
    names = {id(site.module): site.name for site in sites}
    kv: dict[str, SiteKV] = {}
    hidden: dict[str, Tensor] = {}
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    shared: dict[str, str] = {}
    owners: list[tuple[Tensor, str]] = []  # holds the tensors, so that no address is used twice

    def listener(module: nn.Module, key: Tensor, value: Tensor, arguments: dict[str, Any]) -> None:
        if id(module) in names:  # not one of the layers that were left out
            owner = next((name for found, name in owners if found.data_ptr() == key.data_ptr()), None)
            if owner is not None:
                shared[names[id(module)]] = owner
            owners.append((key, names[id(module)]))
            kv[names[id(module)]] = SiteKV(key.detach().clone(), value.detach().clone())

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = names[id(module)]
        source = _source(kwargs)
        hidden[name] = (args[0] if source is None else kwargs[source]).detach().clone()
        dropped = dict.fromkeys(("attention_mask", "past_key_values", "mask"))
        calls[name] = (args, {k: dropped.get(k, v) for k, v in kwargs.items()})

    with ExitStack() as stack:
        for site in sites:
            handle = site.module.register_forward_pre_hook(before, with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(evaluating(base))
        stack.enter_context(torch.no_grad())
        stack.enter_context(routed(base))
        stack.enter_context(listening(listener))
        base(**run_inputs(base, ids))
    return Capture(KVPrefix({site.name: kv[site.name] for site in sites}), hidden, calls, shared)


def keys_at(base: PreTrainedModel, sites: list[Site], ids: Tensor, position: int) -> dict[str, SiteKV]:
    """Keys and values of single tokens `[n, 1]`, each alone at `position`, by site. No gradient."""
    names = {id(site.module): site.name for site in sites}
    found: dict[str, SiteKV] = {}

    def listener(module: nn.Module, key: Tensor, value: Tensor, arguments: dict[str, Any]) -> None:
        found[names[id(module)]] = SiteKV(key.clone(), value.clone())

    with evaluating(base), torch.no_grad(), routed(base), listening(listener):
        base(**run_inputs(base, ids), position_ids=torch.full_like(ids, position))
    return found


class _ReachedError(Exception):
    """The model has run as far as was asked."""


def entering(model: nn.Module, site: Site, inputs: dict[str, Any]) -> Tensor:
    """The hidden states `[B, n, d]` that enter `site` when `model` runs `inputs`; it stops there. No gradient."""
    found: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        source = _source(kwargs)
        found.append((args[0] if source is None else kwargs[source]).detach())
        raise _ReachedError

    handle = site.module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        with evaluating(model), torch.no_grad(), suppress(_ReachedError):
            model(**inputs)
    finally:
        handle.remove()
    return found[0]


def _source(kwargs: dict[str, Any]) -> str | None:
    """Which argument of a site's forward its keys and values are projected from; None is the first positional one."""
    for name in (*SOURCES, "hidden_states"):
        if isinstance(kwargs.get(name), Tensor):
            return name
    return None


def project(site: Site, call: tuple[tuple[Any, ...], dict[str, Any]], hidden: Tensor) -> SiteKV:
    """Keys and values of `hidden` `[1, P, d]` by the site's own forward: K_p = P^l W_K, V_p = P^l W_V, with its
    biases, norms and rotation for positions 0..P-1. It stops where attention would begin. Differentiable in `hidden`.
    """
    args, kwargs = call
    source = _source(kwargs)
    if source is None:
        args = (hidden, *args[1:])
    else:
        kwargs = {**kwargs, source: hidden}
    found: list[SiteKV] = []

    def reached(module: nn.Module, key: Tensor, value: Tensor, arguments: dict[str, Any]) -> None:
        found.append(SiteKV(key, value))
        raise _ReachedError

    with listening(reached), suppress(_ReachedError):
        site.module(*args, **kwargs)
    return found[0]


def moves_positions(base: PreTrainedModel) -> bool:
    """Whether text can be placed at positions P.. by `position_ids`: the base takes them and counts from 0 itself."""
    if base.config.is_encoder_decoder or "position_ids" not in inspect.signature(base.forward).parameters:
        return False
    inputs = probe_inputs(base)
    positions = torch.arange(inputs["input_ids"].shape[1], device=base.device)[None]
    with evaluating(base), torch.no_grad():
        counted = first_output(base(**inputs))
        placed = first_output(base(**inputs, position_ids=positions))
    return torch.equal(counted, placed)
