"""Dynamic prefixes: a static prefix that each row's own prompt changes.

The prompt is read as x `[B, d]`: the mean over its tokens of the hidden states that enter the attention of an early
layer (`dynamic_layer`; the layers after it are not run), or of the input embeddings, measured from the mean of random
tokens in their deviations, so that what all texts share does not drown what tells them apart. From x:

    dynamic   a row's keys and values of a site                                     trained parameters
    low_rank  static + deviation * (a(x) C),    a(x) = tanh(x A / sqrt(d))          rank (d + N)
    mixture   static + deviation * (a(x) C),    a(x) = softmax(x A / sqrt(d))       prefixes (d + N)
    gates     K_p static,  V_p = static * 2 sigmoid(x G / sqrt(d)), one per head    d x Σ_sites H_kv

N = Σ_sites H_kv (d_k + d_v) (P - frozen) as in a direct prefix. C and G are nought at first, so each starts exactly
as the static prefix, which is trained with it; frozen layers stay the static prefix's. A gate scales values alone: the
output of a head is linear in them, so it is how much the head takes from the prefix, and keys and values stay plain
data that every engine reads.

`low_rank` follows Wu et al. 2022 (arXiv:2204.04497, section 3: a bottleneck generates the prompt from the sentence's
representation), `mixture` Asai et al. 2022 (arXiv:2205.11961, section 3.2: attention over a bank of prompts), `gates`
Zhang et al. 2023 (arXiv:2305.15212, section 3: gates per layer of a prefix, from the input).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import InputError
from .forms import Form, PrefixConfig, chosen_sites, trained_sites
from .kv import KVPrefix, SiteKV
from .prompts import Prompt
from .sites import Site, entering, vocabulary_size

DEFAULT_LAYER = 2


class Dynamic(Form):
    """A form that is called with pooled prompts `[B, d]` and gives B rows; called without them, its static part."""

    usual: Tensor
    spread: Tensor

    def __init__(self, static: Form, changing: Sequence[str], frozen: int, layer: int, random: Tensor) -> None:
        super().__init__()
        self.static, self.length, self.layer = static, static.length, layer
        self.changing = list(changing)  # names of the sites that a row changes
        self.frozen = min(frozen, static.length - 1)
        self.register_buffer("usual", random.mean(0))  # [d], of pooled random texts
        self.register_buffer("spread", random.std(0, correction=0).clamp(min=1e-6))

    def forward(self, pooled: Tensor | None = None) -> KVPrefix:
        static = self.static()
        if pooled is None:
            return static
        x = nn.functional.layer_norm((pooled - self.usual) / self.spread, pooled.shape[1:])
        changed = self.changed({n: static.sites[n] for n in self.changing}, x / pooled.shape[1] ** 0.5)
        others = {
            name: SiteKV(*(tensor.expand(len(x), -1, -1, -1) for tensor in kv))
            for name, kv in static.sites.items()
            if name not in changed
        }
        return KVPrefix({name: (changed | others)[name] for name in static.sites})

    def changed(self, static: dict[str, SiteKV], x: Tensor) -> dict[str, SiteKV]:
        """The changing sites of each row of x `[B, d]`, a vector of length 1."""
        raise NotImplementedError

    def generator_state(self) -> dict[str, Tensor]:
        """Everything that is not the static part."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("static.")}


class LowRank(Dynamic):
    """Every row adds its own combination of `size` changes of the prefix."""

    def __init__(
        self, static: Form, changing: Sequence[str], frozen: int, layer: int, random: Tensor, size: int
    ) -> None:
        super().__init__(static, changing, frozen, layer, random)
        self._shapes, start = [], static().detach().sites
        for i, kv in enumerate(start[name] for name in changing):
            for part, tensor in zip(("keys", "values"), kv, strict=True):  # [1, H_kv, P, d]
                moving = tensor[:, :, self.frozen :].float()
                self._shapes.append(moving.shape[1:])
                self.register_buffer(f"deviation_{part}_{i}", moving.std(correction=0).clamp(min=1e-6))
        self.reader = nn.Parameter(torch.randn(random.shape[1], size))
        self.changes = nn.Parameter(torch.zeros(size, sum(shape.numel() for shape in self._shapes)))

    def weights(self, scores: Tensor) -> Tensor:
        """How much of each change a row takes, `[B, size]`."""
        return torch.tanh(scores)

    def changed(self, static: dict[str, SiteKV], x: Tensor) -> dict[str, SiteKV]:
        change = self.weights(x @ self.reader) @ self.changes  # [B, N]
        parts = iter(
            part.view(-1, *shape)  # [B, H_kv, P - frozen, d]
            for part, shape in zip(change.split([s.numel() for s in self._shapes], 1), self._shapes, strict=True)
        )
        sites = {}
        for i, (name, kv) in enumerate(static.items()):
            keys, values = (
                own + getattr(self, f"deviation_{part}_{i}") * nn.functional.pad(next(parts), (0, 0, self.frozen, 0))
                for part, own in zip(("keys", "values"), kv, strict=True)
            )
            sites[name] = SiteKV(keys, values)
        return sites


class Mixture(LowRank):
    """Every row attends to a bank of `size` prefixes and reads their mean by its attention."""

    def weights(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)


class Gates(Dynamic):
    """Every row scales the values of each layer and head, by 0 to 2."""

    def __init__(self, static: Form, changing: Sequence[str], frozen: int, layer: int, random: Tensor) -> None:
        super().__init__(static, changing, frozen, layer, random)
        start = static().detach().sites
        self._kv_heads = [start[name].values.shape[1] for name in changing]
        self.gates = nn.Parameter(torch.zeros(random.shape[1], sum(self._kv_heads)))

    def changed(self, static: dict[str, SiteKV], x: Tensor) -> dict[str, SiteKV]:
        gates = (2 * torch.sigmoid(x @ self.gates)).split(self._kv_heads, 1)  # [B, H_kv] per site
        sites = {}
        for (name, kv), gate in zip(static.items(), gates, strict=True):
            first, rest = kv.values.split([self.frozen, self.length - self.frozen], 2)
            scaled = rest * gate[:, :, None, None]
            sites[name] = SiteKV(
                kv.keys.expand(len(gate), -1, -1, -1),
                torch.cat([first.expand(len(gate), -1, -1, -1).to(scaled), scaled], 2),
            )
        return sites


def make_dynamic(
    config: PrefixConfig, static: Form, base: PreTrainedModel, sites: list[Site], state: dict[str, Tensor] | None = None
) -> Form:
    """`static` itself, or the dynamic form around it that `config` asks for; `state` is a saved generator's.

    Raises InputError for a layer that the base does not have, or a state of other shapes.
    """
    if config.dynamic is None:
        return static
    layers = len(prompt_sites(sites))
    layer = min(DEFAULT_LAYER, layers - 1) if config.dynamic_layer is None else config.dynamic_layer
    if layer >= layers:
        raise InputError(f"dynamic_layer {layer} is not among the base's {layers} layers; choose an early one.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        random = pool(base, sites, _random_prompts(base), layer)
        changing = [site.name for site in trained_sites(config, chosen_sites(config, sites), {})]
        form: Dynamic
        if config.dynamic == "gates":
            form = Gates(static, changing, config.frozen_tokens, layer, random)
        else:
            kind = {"low_rank": LowRank, "mixture": Mixture}[config.dynamic]
            form = kind(static, changing, config.frozen_tokens, layer, random, config.dynamic_size)
    if state is not None:
        _load_generator(form, state)
    return form.to(base.device)


def _load_generator(form: Dynamic, state: dict[str, Tensor]) -> None:
    expected = {name: tensor.shape for name, tensor in form.generator_state().items()}
    if {name: tensor.shape for name, tensor in state.items()} != expected:
        raise InputError("the saved dynamic prefix is damaged: its generator has not the shapes that its header says.")
    form.load_state_dict(state, strict=False)


def prompt_sites(sites: list[Site]) -> list[Site]:
    """The self-attention that reads the prompt: the encoder's where there is one."""
    return [s for s in sites if s.kind == "encoder"] or sites


def _random_prompts(base: PreTrainedModel) -> Prompt:
    """64 rows of 32 tokens from the first 5,000."""
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None) or 32
    ids = torch.randint(min(5000, vocabulary_size(base)), (64, min(32, limit // 2))).to(base.device)
    return Prompt({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.ones_like(ids).bool())


@torch.no_grad()
def pool(base: PreTrainedModel, sites: list[Site], prompt: Prompt, layer: int) -> Tensor:
    """`[B, d]` in float32: the mean over the prompt's tokens, nought where it has none.

    layer: 0 pools input embeddings, l the hidden states that enter the attention of layer l.
    """
    if layer > 0:
        encoder = base.get_encoder() if base.config.is_encoder_decoder else base
        hidden = entering(encoder, prompt_sites(sites)[layer], prompt.inputs)
    elif "inputs_embeds" in prompt.inputs:
        hidden = prompt.inputs["inputs_embeds"]
    else:
        hidden = base.get_input_embeddings()(prompt.inputs["input_ids"])
    own = hidden.float().masked_fill(~prompt.mask[..., None], 0.0)
    return own.sum(1) / prompt.mask.sum(1, keepdim=True).clamp(min=1)
