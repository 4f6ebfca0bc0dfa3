"""PrefixModel: a frozen base and the named prefixes that it can read."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import files
from .attention import Kernel
from .bases import base_of, keep_unpacked, quantisation
from .dynamic import Dynamic, make_dynamic, pool
from .errors import InputError
from .few_rows import few_row_products
from .folder import Folder
from .forms import Finished, Form, PrefixConfig, chosen_sites, direct_from, frozen_layers, make_form
from .kv import KVPrefix, SiteKV, mix_rows
from .last_layer import last_feed_forward, run_at
from .prompts import Prompt, Prompted, find_prompt
from .reading import Reader, rows_for
from .recompute import recomputing_activations
from .roomy_cache import roomy_cache
from .sites import evaluating, find_sites, first_output, moves_positions, probe_inputs, routed

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
FormT = TypeVar("FormT", bound=Form)
ACTIVE: Any = object()  # the default of `prefix=`: whichever prefix is active
Named = str | Sequence[str | None] | None


class PrefixModel(nn.Module):
    """A frozen base with a bank of named prefixes.

    The model is called as the base is. `prefix=` chooses what a call reads: a name, one name (or None) per row, or
    None for the bare base, whose outputs are then bit-identical to never having been wrapped. Without it the call
    reads `active`, the prefix added or chosen last.

    Arguments:
        base: any transformers model whose attention goes through transformers' attention interface; it is frozen.
        tokenizer: needed for starts from an instruction; saved with nothing.
        kernel: `auto`, or `split`, `joined` or `reference` for one way of computing attention (`foreword.attention`).

    Raises InputError when a prefix cannot enter the base exactly; the sentence says why.
    """

    def __init__(self, base: PreTrainedModel, tokenizer: Any = None, kernel: Kernel = "auto") -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        keep_unpacked(base)
        # Of the bare base, whatever is put on it or merged into it later.
        self.fingerprint, self.base_parameters = files.fingerprint(base), base.num_parameters()
        self.tokenizer = tokenizer
        self.kernel = kernel
        self.sites = find_sites(base)
        self.can_move_positions = moves_positions(base)
        self.forms = _Bank()
        self._reader = Reader(base, self.sites)
        self.configs: dict[str, PrefixConfig] = {}
        self.headers: dict[str, dict[str, Any]] = {}
        self.active: str | None = None
        self._padded = False
        self._folder: Folder | None = None
        self.parts = nn.ModuleDict()  # what `foreword.combine` puts on the base, and its settings
        self.combined: dict[str, Any] = {}
        self._prompts: WeakKeyDictionary[Any, Prompt] = WeakKeyDictionary()  # of caches, for dynamic prefixes
        self._accepts = set(inspect.signature(base.forward).parameters)
        self._register_state_dict_hook(_without_base)

    # ---- the bank

    def add(self, name: str, config: PrefixConfig | None = None, **settings: Any) -> Form:
        """Make a new prefix at its start, and activate it. `settings` are PrefixConfig's fields."""
        self._check_new(name)
        config = replace(config or PrefixConfig(), **settings)
        if config.positions == "after" and not self.can_move_positions:
            raise InputError(f"{type(self.base).__name__} cannot move its positions; use positions='kept'.")
        if self.is_sharded and config.form == "projected":
            raise InputError(
                "the form projected runs projections of the base by themselves, which a sharded base cannot; "
                "use direct or mlp, or do not shard."
            )
        form = make_dynamic(config, make_form(config, self.base, self.sites, self.tokenizer), self.base, self.sites)
        positions = config.positions or ("after" if self.can_move_positions else "kept")
        if config.window == "slides" and positions == "kept":
            raise InputError("a prefix can slide out of the window only where text comes after it (positions='after').")
        frozen = frozen_layers(config, chosen_sites(config, self.sites))
        self.configs[name] = replace(config, length=form.length, positions=positions, frozen_layers=frozen)
        self.forms[name] = form
        self.active = name
        return form

    def load(self, directory: str | Path, name: str | None = None, *, trainable: bool = False) -> Form:
        """Load a saved prefix and activate it; `trainable` goes on training its keys and values (form `direct`), and
        what makes them dynamic.

        Raises InputError when the directory is damaged or the prefix belongs to another base.
        """
        header, tensors = files.read(directory)
        name = name or re.sub(r"[^A-Za-z0-9_-]", "-", Path(directory).resolve().name)[:64].strip("-_") or "prefix"
        self._check_new(name)
        own = self.fingerprint
        if header["base"]["fingerprint"] != own:
            raise InputError(
                f"{directory} was trained for {header['base']['id']} (fingerprint {header['base']['fingerprint']}), "
                f"not for this base ({self.base_id}, fingerprint {own}); load it on its own base."
            )
        if header.get("combined"):
            from . import combine

            combine.restore(self, header["combined"], tensors, trainable)
        kv = files.kv_from(header, tensors).to(self.base.device)
        config = PrefixConfig.from_dict(header["prefix"])
        static = direct_from(config, kv, self.sites).to(self.base.device) if trainable else Finished(kv)
        form = make_dynamic(config, static, self.base, self.sites, files.generator_from(tensors))
        form.requires_grad_(trainable)
        self.configs[name] = replace(config, form="direct") if trainable else config
        self.forms[name], self.headers[name], self.active = form, header, name
        return form

    def put(self, name: str, kv: KVPrefix, like: str) -> Form:
        """Name finished keys and values and activate them; they are read as the prefix `like` is."""
        self._check_known(like)
        config = replace(self.configs[like], form="direct", dynamic=None)
        return self.hold(name, Finished(kv.to(self.base.device)), config)

    def hold(self, name: str, form: FormT, config: PrefixConfig) -> FormT:
        """Name a form that was made elsewhere, read as `config` says, and activate it."""
        self._check_new(name)
        self.configs[name] = replace(config, length=form.length)
        self.forms[name], self.active = form, name
        return form

    def attach(self, folder: str | Path, memory: int = 1 << 30) -> Folder:
        """From now on calls may name every prefix in `folder`, one directory each, without its being loaded before.

        memory: bytes of keys and values that may stay in memory between calls; the least recently named leave.
        """
        self._folder = Folder(self, folder, memory)
        return self._folder

    def remove(self, name: str) -> None:
        """Drop a prefix from the bank."""
        self._check_known(name)
        del self.forms[name], self.configs[name]
        self.headers.pop(name, None)
        self.active = None if self.active == name else self.active

    def activate(self, name: str | None) -> None:
        """Choose what calls without `prefix=` read; None is the bare base."""
        if name is not None:
            self._check_known(name)
        self.active = name

    def form(self, name: str) -> Form:
        """The form of a prefix in the bank."""
        self._check_known(name)
        return cast(Form, self.forms[name])

    def kv(self, name: str) -> KVPrefix:
        """The finished keys and values of a prefix (of a dynamic one the static part), in the graph while gradients
        are on."""
        return self.form(name)()

    def count(self, name: str | None = None) -> int:
        """Trained parameters of a prefix (the active one by default)."""
        name = name or self.active
        if name is None:
            return 0
        saved = self.headers.get(name)
        return self.form(name).count() or (saved["prefix"]["parameters"] if saved else 0)

    def text_limit(self, name: str | None = None) -> int | None:
        """How many tokens of text the base takes behind a prefix; None where its positions have no end."""
        limit = getattr(self.base.config.get_text_config(), "max_position_embeddings", None)
        name = name or self.active
        if limit is None or name is None or self.configs[name].positions == "kept":
            return limit
        return limit - self.form(name).length

    def _check_new(self, name: str) -> None:
        if not NAME_PATTERN.fullmatch(name):
            raise InputError(f"{name!r} cannot name a prefix; use letters, digits, - and _, at most 64.")
        if name in self.forms:
            raise InputError(f"a prefix named {name!r} is there already; remove it or choose another name.")

    def _check_known(self, name: str) -> None:
        if name not in self.forms:
            known = ", ".join(self.forms) or "none"
            raise InputError(f"there is no prefix named {name!r}; loaded are: {known}.")

    # ---- running

    def forward(
        self,
        *args: Any,
        prefix: Named = ACTIVE,
        packed: Sequence[int] | None = None,
        prompt_mask: Tensor | None = None,
        read_at: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base's forward, every site reading the prefix. Returns what the base returns.

        packed: the lengths of rows that lie one behind another in one sequence `[1, sum]`, so that nothing is padded.
        read_at: `[N]`, the tokens, counted through all rows, whose hidden states behind the last layer the caller
            reads; those of others may then be wrong.
        prompt_mask: `[B, n]`, 1 on the tokens that a dynamic prefix is made from; by default a decoder's before its
            `labels`, and otherwise all.
        """
        uncached = torch.is_grad_enabled() or packed is not None
        if uncached and "use_cache" in self._accepts and kwargs.get("past_key_values") is None:
            kwargs.setdefault("use_cache", False)
        nothing_kept = self.base.is_activation_checkpointing or not torch.is_grad_enabled()
        with (
            self._reading(prefix, packed, prompt_mask=prompt_mask),
            nullcontext() if nothing_kept else recomputing_activations(self.base),
            self._last_layer_at(read_at, prefix),
        ):
            return self.base(*args, **kwargs)

    def _last_layer_at(self, read_at: Tensor | None, prefix: Named) -> AbstractContextManager[None]:
        """What leaves out the last layer's feed-forward of tokens that are not read, where that is sure to be exact."""
        if read_at is None or self.is_sharded or self.base.is_activation_checkpointing:
            return nullcontext()
        if any(isinstance(self.form(name), Dynamic) for name in self._names(prefix)[1]):
            return nullcontext()
        last = last_feed_forward(self.base, self.sites)
        return nullcontext() if last is None else run_at(last, read_at)

    def reads(self, prefix: Named = ACTIVE) -> bool:
        """Whether any row reads a prefix."""
        return bool(self._names(prefix)[1])

    def reads_only(self, name: str, prefix: Named = ACTIVE) -> bool:
        """Whether all rows read the prefix `name`."""
        return set(self._names(prefix)[0]) == {name}

    def by_row(self, prefix: Named = ACTIVE) -> bool:
        """Whether each row names its own prefix."""
        return len(self._names(prefix)[0]) > 1

    def packs(self, prefix: Named = ACTIVE) -> bool:
        """Whether rows that read `prefix` can be packed: on a CPU, whose split attention takes them so, where some
        prefix is read, `can_pack`, and none slides or is dynamic."""
        chosen = self._names(prefix)[1]
        if not chosen or self._padded or self.device.type != "cpu" or self.kernel == "joined":
            return False
        return self.can_pack and all(self._packs(name) for name in chosen)

    def _packs(self, name: str) -> bool:
        return self.configs[name].window == "visible" and not isinstance(self.form(name), Dynamic)

    @contextmanager
    def padded(self) -> Iterator[None]:
        """While open, nothing is packed, for what looks into attention row by row."""
        before, self._padded = self._padded, True
        try:
            yield
        finally:
            self._padded = before

    @cached_property
    def can_pack(self) -> bool:
        """Whether rows can lie one behind another in one sequence: found by comparing a few tokens with and without.

        Not where positions cannot be moved, and not under masks other than causality and windows behind it.
        """
        kinds = set(getattr(self.base.config.get_text_config(), "layer_types", None) or [])
        windowed_encoder = any(site.window is not None for site in self.sites if site.kind != "decoder")
        if not self.can_move_positions or windowed_encoder or kinds - {"full_attention", "sliding_attention"}:
            return False
        ids = probe_inputs(self.base)["input_ids"]
        with evaluating(self.base), torch.no_grad():
            rows = [ids[:, :3], ids]
            alone = [first_output(self(row, prefix=None)) for row in rows]
            packed = first_output(self(torch.cat(rows, 1), prefix=None, packed=[row.shape[1] for row in rows]))
        tolerance = 1e-3 if packed.dtype in (torch.float32, torch.float64) else 1e-1
        return torch.allclose(torch.cat(alone, 1), packed, rtol=tolerance, atol=tolerance * float(packed.abs().max()))

    @torch.no_grad()
    def generate(self, *args: Any, prefix: Named = ACTIVE, **kwargs: Any) -> Any:
        """The base's `generate` with all of its arguments, every step reading the prefix; a dynamic one is made from
        the prompt, once."""
        settings = kwargs.get("generation_config") or self.generation_config
        whole = kwargs.get("prefill_chunk_size", getattr(settings, "prefill_chunk_size", None)) is None
        ours = self.reads(prefix) and self._makes_cache(kwargs)
        if ours:
            kwargs["past_key_values"] = roomy_cache(self.config.get_text_config(decoder=True))
        # What is computed in inference mode can never be trained on, so none of it but the tokens leaves.
        apart = ours and not self.is_sharded and not self._asked(kwargs, "return_dict_in_generate")
        with (
            torch.inference_mode() if apart else nullcontext(),
            self._reading(prefix, once=True, whole=whole),
            self._few_row_products(prefix),
        ):
            made = cast(Any, self.base).generate(*args, **kwargs)
        return made.clone() if isinstance(made, Tensor) else made

    @contextmanager
    def reading(self, prefix: Named = ACTIVE, packed: Sequence[int] | None = None) -> Iterator[None]:
        """While open, calls of the base itself (`model.base(...)`, a pipeline over it) read the prefix too.

        packed: as `forward` takes it; each call must then hold just these rows.
        """
        with self._reading(prefix, packed), self._few_row_products(prefix):
            yield

    def _makes_cache(self, given: dict[str, Any]) -> bool:
        """Whether a generation with these arguments would make itself a plain cache, on the CPU."""
        asked = partial(self._asked, given)
        plain = asked("cache_implementation") is None and asked("use_cache") is not False
        base: Any = self.base
        able = self.kind == "decoder" and self.device.type == "cpu" and base._supports_default_dynamic_cache()
        return plain and able and given.get("past_key_values") is None

    def _asked(self, given: dict[str, Any], key: str) -> Any:
        """What a generation's arguments, its configuration or the base's say of a setting; None where none does."""
        configs = (getattr(config, key, None) for config in (given.get("generation_config"), self.generation_config))
        return next((value for value in (given.get(key), *configs) if value is not None), None)

    def _few_row_products(self, prefix: Named) -> AbstractContextManager[None]:
        """The faster products where a prefix is read: what reads none is computed as the base computes it."""
        return few_row_products(self.base) if self.reads(prefix) and not self.is_sharded else nullcontext()

    @contextmanager
    def _reading(
        self,
        prefix: Named,
        packed: Sequence[int] | None = None,
        prompt_mask: Tensor | None = None,
        once: bool = False,
        whole: bool = True,
    ) -> Iterator[None]:
        names, chosen = self._names(prefix)
        for name in chosen:
            self._check_known(name)
        if not chosen:
            nothing = None if packed is None else KVPrefix({s.name: s.nothing(self.base) for s in self.sites})
            with self._reader.open(nothing, lengths=packed):
                yield
            return
        kinds = {(self.configs[n].positions, self.configs[n].window) for n in chosen}
        if len(kinds) > 1:
            raise InputError("prefixes that differ in `positions` or `window` cannot be mixed in one batch.")
        if packed is not None and not all(self._packs(name) for name in chosen):
            raise InputError("rows cannot be packed behind a prefix that slides or is dynamic; pad them.")
        kv: KVPrefix | Prompted
        if any(isinstance(self.form(name), Dynamic) for name in chosen):
            if not whole:
                raise InputError("a dynamic prefix is made from the prompt in one piece; leave out prefill_chunk_size.")
            kv = self._prompted(names, chosen, prompt_mask, once)
        else:
            kv = self._mixed(names, chosen)
        if self.base.is_activation_checkpointing:
            self.gradient_checkpointing_enable()
        with self.routed(kv, self.configs[chosen[0]], packed):
            yield

    @contextmanager
    def routed(
        self, kv: KVPrefix | Prompted | None, config: PrefixConfig, packed: Sequence[int] | None = None
    ) -> Iterator[None]:
        """While open, calls of the base read `kv` as `config` says, or nothing but through the same attention."""
        if kv is None:
            with self._reader.open(None), routed(self.base):
                yield
            return
        after, slides = config.positions == "after", config.window == "slides"
        with self._reader.open(kv, after=after, slides=slides, kernel=self.kernel, lengths=packed):
            yield

    def _names(self, prefix: Named) -> tuple[list[str | None], list[str]]:
        """One name for all rows or each row's own, and every prefix among them once."""
        prefix = self.active if prefix is ACTIVE else prefix
        names = [prefix] if isinstance(prefix, str) or prefix is None else list(prefix)
        chosen = list(dict.fromkeys(name for name in names if name is not None))
        if self._folder is not None:
            self._folder.fetch(chosen)
        return names, chosen

    def _prompted(self, names: list[str | None], chosen: list[str], mask: Tensor | None, once: bool) -> Prompted:
        """The batch's prefix where some of it is made from the prompt."""
        find = partial(find_prompt, prompt_mask=mask, decoder=self.kind == "decoder", positions=self.can_move_positions)
        return Prompted(partial(self._mixed, names, chosen), find, self._prompts, once)

    def _mixed(self, names: list[str | None], chosen: list[str], prompt: Prompt | None = None) -> KVPrefix:
        """One prefix for the batch: the only one named, or each row's own."""
        if len(names) == 1:
            return self._made(chosen[0], prompt)
        if prompt is not None:
            names = [names[i] for i in rows_for(len(names), len(prompt.mask))]
        made = {name: self._made(name, prompt, [r for r, n in enumerate(names) if n == name]) for name in chosen}
        if any(kv.sites.keys() != made[chosen[0]].sites.keys() for kv in made.values()):
            raise InputError("prefixes that enter different layers cannot be mixed in one batch.")
        sites = made[chosen[0]].sites.items()
        nothing = KVPrefix({n: SiteKV(kv.keys[:1, :, :0], kv.values[:1, :, :0]) for n, kv in sites})
        order: list[str | None] = [*chosen, None] if None in names else [*chosen]
        return mix_rows([nothing if n is None else made[n] for n in order], [order.index(n) for n in names])

    def _made(self, name: str, prompt: Prompt | None, rows: list[int] | None = None) -> KVPrefix:
        """A prefix for the rows of the prompt, or for `rows` of them; of a static one for all alike."""
        form = self.form(name)
        if prompt is None or not isinstance(form, Dynamic):
            return form()
        if form.layer not in prompt.pooled:
            prompt.pooled[form.layer] = pool(self.base, self.sites, prompt, form.layer)
        pooled = prompt.pooled[form.layer]
        return form(pooled if rows is None else pooled[rows])

    # ---- training

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Checkpoint the base's layers; the second run of a layer reads the same prefix as its first."""
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise InputError("gradient checkpointing of a prefix needs use_reentrant=False.")
        kwargs = {"use_reentrant": False, "context_fn": self._reader.checkpoint_contexts}
        self.base.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self.base.activation_checkpointing_disable()

    # ---- files

    def header(self, name: str, task: dict[str, Any] | None = None, training: dict[str, Any] | None = None) -> dict:
        """What `prefix.json` says of a prefix."""
        kv, config = self.kv(name), self.configs[name]
        sites = {site.name: site for site in self.sites}
        return {
            "base": {
                "id": self.base_id,
                "fingerprint": self.fingerprint,
                "model": type(self.base).__name__.removeprefix("FSDP"),  # a sharded module's class is a made one
                "parameters": self.base_parameters,
                "quantisation": quantisation(self.base),
                "shared_layers": getattr(self.config.get_text_config(), "num_kv_shared_layers", 0) or 0,
            },
            "prefix": {**config.to_dict(), "start": config.chosen_start, "parameters": self.count(name)},
            "sites": [
                {
                    "name": n,
                    "kind": sites[n].kind,
                    "window": sites[n].window,
                    "keys": list(s.keys.shape[1:]),
                    "values": list(s.values.shape[1:]),
                }
                for n, s in kv.sites.items()
            ],
            "combined": self.combined or None,
            "task": task,
            "training": training,
        }

    @torch.no_grad()
    def save_pretrained(
        self,
        directory: str | Path,
        name: str | None = None,
        *,
        task: dict[str, Any] | None = None,
        training: dict[str, Any] | None = None,
        extra: dict[str, Tensor] | None = None,
    ) -> None:
        """Save one prefix (the active one by default), with what a task adds to header and tensors."""
        name = name or self.active
        if name is None:
            raise InputError("there is no active prefix to save; name one.")
        form = self.form(name)
        generator = files.generator_tensors(form.generator_state()) if isinstance(form, Dynamic) else {}
        tensors = {**files.kv_tensors(self.kv(name)), **generator, **(extra or {})}
        if self.combined:
            from . import combine

            tensors |= combine.tensors(self)
        files.write(directory, self.header(name, task, training), tensors)

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, base: PreTrainedModel | None = None, tokenizer: Any = None, **kwargs: Any
    ) -> PrefixModel:
        """A saved prefix on its base, which is loaded by the id in the file unless it is given."""
        header = files.read_header(directory)
        if base is None:
            base, tokenizer = base_of(header)
        model = cls(base, tokenizer, **kwargs)
        model.load(directory)
        return model

    def push_to_hub(self, repo_id: str, name: str | None = None, **kwargs: Any) -> Any:
        """Upload one prefix to the hub, as `save_pretrained` writes it."""
        import tempfile

        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / (name or self.active or "prefix")
            self.save_pretrained(target, name)
            api = HfApi()
            api.create_repo(repo_id, exist_ok=True)
            return api.upload_folder(repo_id=repo_id, folder_path=str(target), **kwargs)

    @property
    def kind(self) -> str:
        """`decoder`, `encoder` or `encoder-decoder`."""
        return "encoder-decoder" if self.config.is_encoder_decoder else self.sites[0].kind

    @property
    def is_sharded(self) -> bool:
        """Whether several processes hold the base's weights together."""
        return bool(getattr(self.base, "is_distributed_loading_by_transformers", False))

    @property
    def base_id(self) -> str:
        return self.base.config._name_or_path or type(self.base).__name__

    @property
    def config(self) -> Any:
        return self.base.config

    @property
    def generation_config(self) -> Any:
        return self.base.generation_config

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype


class _Bank(nn.ModuleDict):
    """A ModuleDict that takes every name, those of Module's own methods (`train`, `keys`, `half`) too."""

    def __setitem__(self, key: str, module: nn.Module) -> None:
        self._modules[key] = module


def _without_base(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    """A state dict holds what was learned; the frozen base stays where it came from."""
    for key in [key for key in state if key.startswith(f"{prefix}base.") and ".lora_" not in key]:
        del state[key]
