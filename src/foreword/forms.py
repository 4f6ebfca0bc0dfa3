"""Forms: how trainable parameters become keys and values. Each is a start plus a learned change.

The start is text that the base has read (an instruction, or tokens drawn from the vocabulary) or noise of the same
mean and deviation. What a form makes is a `KVPrefix`; it knows nothing of tasks or of how a prefix is read.

    form       keys and values of a site                            trained parameters
    direct     K_p, V_p = start + parameters                        Σ_sites H_kv (d_k + d_v) (P - frozen)
    projected  K_p = P^l W_K, V_p = P^l W_V                         sites x P x d
    mlp        K_p, V_p = start + W_2 tanh(W_1 E + b_1) + b_2       Li & Liang 2021 (arXiv:2101.00190), section 4.3

All changes are measured in the deviation of what they change, site by site, so that one learning rate fits all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from .errors import InputError
from .kv import KVPrefix, SiteKV
from .sites import Capture, Kind, Site, capture, project, routed, vocabulary_size

DEFAULT_LENGTH = 16


@dataclass(frozen=True)
class PrefixConfig:
    """What a prefix is made of.

    form: `projected`, `direct` or `mlp`.
    length: P, virtual tokens; by default the instruction's own length, else 16.
    start: `instruction`, `vocabulary` or `random`; by default the instruction if there is one, else vocabulary.
    instruction: the text whose keys and values are where training starts.
    frozen_tokens: how many first tokens stay as they start (the attention sink); not in `projected`.
    frozen_layers: how many first layers' keys and values stay as they start; no gradient is computed below the first
        that is trained. By default half of a decoder's where they start from an instruction, else none.
    mlp_size: width of the hidden layer of `mlp`.
    layers: which of the base's layers the prefix enters; all by default.
    sites: which kinds of sites it enters, of `encoder`, `decoder` and `cross`; all by default.
    window: in sliding-window layers the prefix stays `visible`, or `slides` out as real tokens would.
    positions: text comes `after` the prefix's positions or is `kept` at 0; by default after, where the base allows.
    dynamic: how the prompt changes its own row's prefix: `low_rank`, `mixture` or `gates` (`foreword.dynamic`).
    dynamic_size: changes in `low_rank`, prefixes in `mixture`.
    dynamic_layer: whose input is the reading of the prompt, 0 for the input embeddings; by default 2.
    seed: of the random start.
    """

    form: Literal["direct", "projected", "mlp"] = "projected"
    length: int | None = None
    start: Literal["instruction", "vocabulary", "random"] | None = None
    instruction: str | None = None
    frozen_tokens: int = 1
    frozen_layers: int | None = None
    mlp_size: int = 512
    layers: tuple[int, ...] | None = None
    sites: tuple[Kind, ...] | None = None
    window: Literal["visible", "slides"] = "visible"
    positions: Literal["after", "kept"] | None = None
    dynamic: Literal["low_rank", "mixture", "gates"] | None = None
    dynamic_size: int = 4
    dynamic_layer: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise InputError(f"form {self.form!r} is unknown; choose one of {', '.join(FORMS)}.")
        if self.length is not None and self.length < 1:
            raise InputError(f"the prefix length must be at least 1, not {self.length}.")
        if self.start not in (None, "instruction", "vocabulary", "random"):
            raise InputError(f"start {self.start!r} is unknown; choose instruction, vocabulary or random.")
        unknown = [kind for kind in self.sites or () if kind not in get_args(Kind)]
        if unknown or self.sites == ():
            raise InputError(
                f"sites {', '.join(unknown) or '()'} are unknown; choose among encoder, decoder and cross."
            )
        if self.window not in ("visible", "slides"):
            raise InputError(f"window {self.window!r} is unknown; choose visible or slides.")
        if self.positions not in (None, "after", "kept"):
            raise InputError(f"positions {self.positions!r} is unknown; choose after or kept.")
        if self.frozen_tokens < 0:
            raise InputError(f"frozen_tokens must be 0 or more, not {self.frozen_tokens}.")
        if self.frozen_layers is not None and self.frozen_layers < 0:
            raise InputError(f"frozen_layers must be 0 or more, not {self.frozen_layers}.")
        if self.mlp_size < 1:
            raise InputError(f"mlp_size must be at least 1, not {self.mlp_size}.")
        if self.dynamic not in (None, *DYNAMIC):
            raise InputError(f"dynamic {self.dynamic!r} is unknown; choose one of {', '.join(DYNAMIC)}.")
        if self.dynamic_size < 1:
            raise InputError(f"dynamic_size must be at least 1, not {self.dynamic_size}.")
        if self.dynamic_layer is not None and self.dynamic_layer < 0:
            raise InputError(f"dynamic_layer must be 0 or more, not {self.dynamic_layer}.")

    @property
    def chosen_start(self) -> str:
        return self.start or ("vocabulary" if self.instruction is None else "instruction")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> PrefixConfig:
        """The inverse of `to_dict`, also after JSON; what else a saved prefix says of itself is left out."""
        known: dict[str, Any] = {k: v for k, v in saved.items() if k in cls.__dataclass_fields__}
        known |= {k: tuple(v) for k, v in known.items() if isinstance(v, list)}
        return cls(**known)


class Form(nn.Module):
    """A prefix under training. Calling it gives the `KVPrefix`; its parameters are float32."""

    length: int

    def count(self) -> int:
        """Trainable parameters."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


class _Started(Form):
    """A form whose keys and values are start + deviation * change; the first `frozen` tokens do not change.

    The deviation is that of the site's own start, a number for keys and one for values: in SmolLM2 the first layer's
    values are thirty times smaller than the last's, and one learning rate has to fit them all.
    """

    def __init__(self, start: KVPrefix, frozen: int) -> None:
        super().__init__()
        self.names, self.length = list(start.sites), start.length
        self.frozen = min(frozen, self.length - 1)
        for i, kv in enumerate(start.sites.values()):
            for part, tensor in zip(("keys", "values"), kv, strict=True):
                own = tensor.detach().float().clone(memory_format=torch.contiguous_format)
                self.register_buffer(f"start_{part}_{i}", own)  # [1, H_kv, P, d]
                self.register_buffer(
                    f"deviation_{part}_{i}", own[:, :, self.frozen :].std(correction=0).clamp(min=1e-6)
                )

    def _changed(self, changes: Sequence[tuple[Tensor, Tensor]]) -> KVPrefix:
        """The prefix for each site's changes `[1, H_kv, P - frozen, d]` of keys and of values."""
        sites = {}
        for i, (name, change) in enumerate(zip(self.names, changes, strict=True)):
            keys, values = (
                getattr(self, f"start_{part}_{i}")
                + getattr(self, f"deviation_{part}_{i}") * nn.functional.pad(moved, (0, 0, self.frozen, 0))
                for part, moved in zip(("keys", "values"), change, strict=True)
            )
            sites[name] = SiteKV(keys, values)
        return KVPrefix(sites)


class Direct(_Started):
    """The changes of keys and values are the parameters themselves."""

    def __init__(self, start: KVPrefix, frozen: int) -> None:
        super().__init__(start, frozen)
        kvs = [SiteKV(*(x[:, :, self.frozen :] for x in kv)) for kv in start.sites.values()]
        self.keys = nn.ParameterList(nn.Parameter(torch.zeros(kv.keys.shape)) for kv in kvs)
        self.values = nn.ParameterList(nn.Parameter(torch.zeros(kv.values.shape)) for kv in kvs)

    def forward(self) -> KVPrefix:
        return self._changed(list(zip(self.keys, self.values, strict=True)))


class MLP(_Started):
    """The changes come from a two-layer network over an embedding, run once per step, whatever the batch."""

    def __init__(self, start: KVPrefix, frozen: int, embedding_size: int, size: int) -> None:
        super().__init__(start, frozen)
        self._shapes = [(kv.keys.shape[1], kv.keys.shape[3], kv.values.shape[3]) for kv in start.sites.values()]
        self.embedding = nn.Parameter(torch.randn(self.length - self.frozen, embedding_size))
        self.inner = nn.Linear(embedding_size, size)
        self.outer = nn.Linear(size, sum(heads * (dk + dv) for heads, dk, dv in self._shapes))
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self) -> KVPrefix:
        change = self.outer(torch.tanh(self.inner(self.embedding)))  # [P - frozen, Σ H_kv (d_k + d_v)]
        parts = change.split([heads * size for heads, *sizes in self._shapes for size in sizes], dim=1)
        shaped = [
            part.view(1, len(part), heads, -1).transpose(1, 2)
            for part, heads in zip(parts, (heads for heads, *_ in self._shapes for _ in "kv"), strict=True)
        ]
        return self._changed(list(zip(shaped[::2], shaped[1::2], strict=True)))


class Projected(Form):
    """Hidden states P^l `[P, d]` per site, put through the site's own frozen projections.

    Like the others start + deviation * change, the deviation being that of the site's own start.
    """

    def __init__(self, base: PreTrainedModel, sites: list[Site], start: Capture) -> None:
        super().__init__()
        self.length = start.kv.length
        own = [s for s in sites if s.name not in start.shared]
        self._sites, self._own, self._calls, self._shared = sites, own, start.calls, start.shared
        self._base = [base]  # in a list, so that it does not become a submodule
        for i, site in enumerate(own):
            hidden = start.hidden[site.name].detach().float().clone()  # [1, P, d]
            self.register_buffer(f"start_{i}", hidden)
            self.register_buffer(f"deviation_{i}", hidden.std(correction=0).clamp(min=1e-6))
        self.hidden = nn.ParameterList(nn.Parameter(torch.zeros(start.hidden[s.name].shape[1:])) for s in own)

    def forward(self) -> KVPrefix:
        base = self._base[0]
        sites = {}
        with routed(base):
            for i, (site, change) in enumerate(zip(self._own, self.hidden, strict=True)):
                call = tree_map(lambda x: x.to(base.device) if isinstance(x, Tensor) else x, self._calls[site.name])
                hidden = getattr(self, f"start_{i}") + getattr(self, f"deviation_{i}") * change
                sites[site.name] = project(site, call, hidden.to(base.dtype))
        return KVPrefix({s.name: sites[self._shared.get(s.name, s.name)] for s in self._sites})


class Finished(Form):
    """A loaded prefix: keys and values that no longer train."""

    def __init__(self, kv: KVPrefix) -> None:
        super().__init__()
        self.names, self.length = list(kv.sites), kv.length
        for i, (keys, values) in enumerate(kv.sites.values()):
            self.register_buffer(f"keys_{i}", keys.contiguous())
            self.register_buffer(f"values_{i}", values.contiguous())

    def forward(self) -> KVPrefix:
        return KVPrefix(
            {n: SiteKV(getattr(self, f"keys_{i}"), getattr(self, f"values_{i}")) for i, n in enumerate(self.names)}
        )


class Upper(Form):
    """A form of the upper layers; those below keep the keys and values of the start."""

    def __init__(self, start: KVPrefix, form: Form) -> None:
        super().__init__()
        self.form, self.length = form, form.length
        trained = form().sites
        self.names = list(start.sites)
        self.below = Finished(KVPrefix({n: kv for n, kv in start.detach().sites.items() if n not in trained}))

    def forward(self) -> KVPrefix:
        sites = {**self.below().sites, **self.form().sites}
        return KVPrefix({name: sites[name] for name in self.names})


FORMS = ("direct", "projected", "mlp")
DYNAMIC = ("low_rank", "mixture", "gates")


def make_form(config: PrefixConfig, base: PreTrainedModel, sites: list[Site], tokenizer: Any) -> Form:
    """A form on `base` as `config` says, at its start. Raises InputError when the start cannot be made."""
    sites = chosen_sites(config, sites)
    generator = torch.Generator().manual_seed(config.seed)
    ids = start_ids(config, base, tokenizer, generator)
    start = capture(base, sites, ids.to(base.device))
    if config.chosen_start == "random":
        start = _as_noise(start, config.frozen_tokens, generator)
    upper = trained_sites(config, sites, start.shared)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        form = _form_of(config, base, upper, start.of(upper)).to(base.device)
    return form if len(upper) == len(sites) else Upper(start.kv, form)


def _form_of(config: PrefixConfig, base: PreTrainedModel, sites: list[Site], start: Capture) -> Form:
    if config.form == "projected":
        return Projected(base, sites, start)
    if config.form == "mlp":
        width = next(iter(start.hidden.values())).shape[-1]
        return MLP(start.kv, config.frozen_tokens, width, config.mlp_size)
    return Direct(start.kv, config.frozen_tokens)


def direct_from(config: PrefixConfig, kv: KVPrefix, sites: list[Site]) -> Form:
    """Finished keys and values to be trained on, as `direct`; what `config` keeps frozen stays so."""
    upper = [s.name for s in trained_sites(config, [s for s in sites if s.name in kv.sites], {})]
    form = Direct(KVPrefix({name: kv.sites[name] for name in upper}), config.frozen_tokens)
    return form if len(upper) == len(kv.sites) else Upper(kv, form)


def trained_sites(config: PrefixConfig, sites: list[Site], shared: dict[str, str]) -> list[Site]:
    """Those above `config.frozen_layers`, of each kind; a site that shares another's keys and values goes with it."""
    numbers, frozen = _layer_numbers(sites), frozen_layers(config, sites)
    upper = [s for s in sites if numbers[shared.get(s.name, s.name)] >= frozen]
    if not upper:
        raise InputError(f"frozen_layers={frozen} leaves none of the prefix's layers to train; freeze fewer.")
    return upper


def frozen_layers(config: PrefixConfig, sites: list[Site]) -> int:
    """How many of the layers that the prefix enters keep their start."""
    if config.frozen_layers is not None:
        return config.frozen_layers
    decoder = all(site.kind == "decoder" for site in sites)
    return len(sites) // 2 if decoder and config.chosen_start == "instruction" else 0


def _layer_numbers(sites: list[Site]) -> dict[str, int]:
    """Each site's place among those of its kind."""
    counts = dict.fromkeys(get_args(Kind), 0)
    numbers = {}
    for site in sites:
        numbers[site.name] = counts[site.kind]
        counts[site.kind] += 1
    return numbers


def chosen_sites(config: PrefixConfig, sites: list[Site]) -> list[Site]:
    """The sites that the prefix enters: those of `config.sites` and of `config.layers` (counted per kind of site)."""
    found = {site.kind for site in sites}
    if config.sites is not None and not set(config.sites) <= found:
        raise InputError(f"the base has {', '.join(sorted(found))} sites alone, not all of {', '.join(config.sites)}.")
    sites = [site for site in sites if config.sites is None or site.kind in config.sites]
    if config.layers is None:
        return sites
    numbers = _layer_numbers(sites)
    kept = [site for site in sites if numbers[site.name] in config.layers]
    if not kept or max(config.layers) > max(numbers.values()):
        raise InputError(f"layers {list(config.layers)} are not all among the base's {max(numbers.values()) + 1}.")
    return kept


def start_ids(config: PrefixConfig, base: PreTrainedModel, tokenizer: Any, generator: torch.Generator) -> Tensor:
    """Token ids `[1, P]` of the text that the prefix starts from.

    A length beyond the instruction's repeats it; a shorter one keeps its first token and its end.
    """
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if config.length is not None and limit is not None and config.length >= limit:
        raise InputError(f"a prefix of {config.length} tokens leaves no room in the model's {limit} positions.")
    opening = [] if tokenizer is None else opening_ids(tokenizer)
    if config.chosen_start != "instruction":
        length = config.length or DEFAULT_LENGTH
        drawn = _draw(base, tokenizer, length, generator)
        return torch.tensor([(opening[:length] + drawn)[:length]])
    if tokenizer is None or config.instruction is None:
        raise InputError("a start from an instruction needs the instruction's text and a tokenizer.")
    text = tokenizer(config.instruction, add_special_tokens=False)["input_ids"]
    if not text:
        raise InputError("the instruction has no tokens; write at least one word.")
    ids = opening + text
    length = config.length or len(ids)
    if limit is not None and length >= limit:
        raise InputError(f"an instruction of {length} tokens leaves no room in the model's {limit} positions.")
    if length > len(ids):
        ids = ids + text * (length // len(text) + 1)
        return torch.tensor([ids[:length]])
    return torch.tensor([ids[:1] + ids[len(ids) - length + 1 :]])


def opening_ids(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer itself puts before a text (a beginning-of-sequence token, or none)."""
    with_special, without = (tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (True, False))
    return with_special[: with_special.index(without[0])] if without and without[0] in with_special else []


def _draw(base: PreTrainedModel, tokenizer: Any, count: int, generator: torch.Generator) -> list[int]:
    """Ordinary tokens from the most common 5,000 (Lester et al. 2021, arXiv:2104.08691, section 3.2): low ids are
    early merges, so frequent text, in the byte-pair vocabularies of today's models."""
    special = set() if tokenizer is None else set(tokenizer.all_special_ids)
    vocabulary = vocabulary_size(base)
    common = torch.tensor([i for i in range(min(vocabulary, 5000 + len(special))) if i not in special])
    return common[torch.randint(len(common), (count,), generator=generator)].tolist()


def _as_noise(start: Capture, frozen: int, generator: torch.Generator) -> Capture:
    """Normal noise with each channel's mean and deviation over the tokens of `start`; the first `frozen` stay."""

    def noise(x: Tensor) -> Tensor:  # [..., P, d]
        mean, deviation = x.mean(-2, keepdim=True), x.std(-2, keepdim=True, correction=0)
        drawn = torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x)
        return torch.cat([x[..., :frozen, :], (mean + deviation * drawn)[..., frozen:, :]], dim=-2)

    sites = {name: SiteKV(noise(kv.keys), noise(kv.values)) for name, kv in start.kv.sites.items()}
    return Capture(KVPrefix(sites), {name: noise(h) for name, h in start.hidden.items()}, start.calls, start.shared)
