"""The KV connector for vLLM's v1 engine (0.32): trained keys and values are written into the paged cache.

Loaded by `kv_connector_module_path`. The scheduler's side matches a request's placeholders as already computed
elsewhere; the worker's side writes the prefix through the attention backend's own writer into the blocks that the
scheduler gave. Every load is asynchronous in vLLM's sense: blocks enter the prefix cache only once they are written,
and a request whose load fails, or that is refused, fails alone.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.logger import init_logger

from ... import files
from ...errors import InputError
from .cache import head_slice, in_order, slots
from .prefixes import CacheLayer, Found, PrefixFolder, check_fits
from .requests import refusal, wanted_by

logger = init_logger(f"vllm.{__name__}")
RESIDENT = 64  # prefixes that a worker keeps in memory


@dataclass
class Load:
    """Write positions `start..stop-1` of a prefix into a request's blocks, one list per group of layers."""

    request: str
    name: str
    digest: str
    start: int
    stop: int
    blocks: tuple[list[int], ...]


@dataclass
class Orders(KVConnectorMetadata):
    """From scheduler to workers, for one step: what to write, and which requests to fail."""

    loads: list[Load] = field(default_factory=list)
    failing: list[str] = field(default_factory=list)


class ForewordConnector(KVConnectorBase_V1, SupportsHMA):
    """Serves the prefixes of `kv_connector_extra_config["prefixes"]`, made for the base that `["base"]` names."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        check_engine(vllm_config)
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._folder = PrefixFolder(extra["prefixes"])
        self._base: str = extra.get("base") or vllm_config.model_config.model
        self._ranks: int = vllm_config.parallel_config.tensor_parallel_size
        self._groups = {n: i for i, g in enumerate(kv_cache_config.kv_cache_groups) for n in g.layer_names}
        self._layers = in_order(self._groups)
        self._sizes = [group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups]
        self._shapes = [_shape(kv_cache_config, self._groups[name], name) for name in self._layers]
        # scheduler
        self._accepted: dict[str, Found] = {}
        self._refused: set[str] = set()
        self._orders = Orders()
        # worker
        self._resident: OrderedDict[str, list[tuple[torch.Tensor, torch.Tensor]]] = OrderedDict()
        self._results = KVConnectorTransferResults()

    # ---- scheduler: which requests read a prefix, and where it goes

    def on_new_request(self, request: Any) -> None:
        """Accept a request for a prefix, or mark it to fail; requests for none pass by."""
        try:
            found = self._accept(request)
        except InputError as error:
            logger.warning("foreword refuses request %s: %s", request.request_id, error)
            request.skip_reading_prefix_cache = False  # or vLLM would not ask, and answer from the placeholders
            self._refused.add(request.request_id)
            return
        if found is not None:
            self._accepted[request.request_id] = found

    def _accept(self, request: Any) -> Found | None:
        wanted = wanted_by(request.kv_transfer_params)
        found = None
        if wanted is not None:
            found = self._folder.find(wanted.prefix)
            check_fits(found, self._shapes, self._ranks, self._base)
            if found.digest != wanted.digest:
                raise InputError(f"prefix {wanted.prefix!r} is not the one that was asked for: it has changed since.")
            if request.skip_reading_prefix_cache:
                raise InputError("with prompt_logprobs the cache, and so the prefix, would be skipped.")
        reason = refusal(wanted, found.length if found else 0, request.prompt_token_ids, request.cache_salt)
        if reason:
            raise InputError(f"{reason}.")
        return found

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """How many tokens are to be written, none of them before this step; a refused request waits for its failure."""
        if request.request_id in self._refused:
            return request.num_tokens - num_computed_tokens, True
        found = self._accepted.get(request.request_id)
        missing = max(0, found.length - num_computed_tokens) if found else 0
        return missing, missing > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if not num_external_tokens:
            return
        if request.request_id in self._refused:
            self._orders.failing.append(request.request_id)
            return
        found = self._accepted[request.request_id]
        start = found.length - num_external_tokens
        own = tuple(list(ids) for ids in blocks.get_block_ids())
        load = Load(request.request_id, found.name, found.digest, start, found.length, own)
        self._orders.loads.append(load)

    def build_connector_meta(self, scheduler_output: Any) -> Orders:
        orders, self._orders = self._orders, Orders()
        return orders

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self._accepted.pop(request.request_id, None)
        self._refused.discard(request.request_id)
        return False, None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, [])

    # ---- worker: keys and values into blocks

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """At start: raises InputError unless every layer's attention backend has a writer of its own."""
        for name in self._layers:
            backend = self._vllm_config.compilation_config.static_forward_context[name].impl
            if not hasattr(backend, "do_kv_cache_update"):
                raise InputError(f"the attention backend {type(backend).__name__} has no writer that foreword can use.")

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Carry out this step's orders. Raises nothing, as that would end the engine: the request alone fails."""
        orders = self._get_connector_metadata()
        assert isinstance(orders, Orders)
        self._results.finished_recving.update(orders.failing)
        self._results.failed_recving.update(orders.failing)
        for load in orders.loads:
            self._results.finished_recving.add(load.request)
            try:
                self._write(load)
            except Exception:
                logger.exception("prefix %s could not be loaded; request %s fails", load.name, load.request)
                self._results.failed_recving.add(load.request)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        results, self._results = self._results, KVConnectorTransferResults()
        return results

    def _write(self, load: Load) -> None:
        kv = self._tensors(load)
        places = [slots(b, s, load.start, load.stop) for b, s in zip(load.blocks, self._sizes, strict=True)]
        modules = self._vllm_config.compilation_config.static_forward_context
        for name, (keys, values) in zip(self._layers, kv, strict=True):
            positions, numbers = places[self._groups[name]]
            if not positions:
                continue
            layer = modules[name]
            device = layer.kv_cache.device
            chosen = torch.tensor(positions)
            mapping = torch.tensor(numbers, dtype=torch.int64, device=device)
            own = [x[chosen].to(device, self._vllm_config.model_config.dtype) for x in (keys, values)]
            layer.impl.do_kv_cache_update(layer, *own, layer.kv_cache, mapping)

    def _tensors(self, load: Load) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """This rank's keys and values of every layer, `[P, heads, d]`, read from disk at first and then kept."""
        kept = self._resident.get(load.digest)
        if kept is None:
            header, tensors = files.read(self._folder.find(load.name).directory)
            if header["digest"] != load.digest:
                raise InputError(f"prefix {load.name!r} has changed since the request was accepted.")
            kept = self._resident[load.digest] = [self._own(tensors, site["name"]) for site in header["sites"]]
            while len(self._resident) > RESIDENT:
                self._resident.popitem(last=False)
        self._resident.move_to_end(load.digest)
        return kept

    def _own(self, tensors: dict[str, torch.Tensor], site: str) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = tensors[f"{site}.keys"], tensors[f"{site}.values"]  # [H_kv, P, d]
        heads = head_slice(len(keys), self._ranks, get_tensor_model_parallel_rank() if self._ranks > 1 else 0)
        return keys[heads].transpose(0, 1).contiguous(), values[heads].transpose(0, 1).contiguous()

    # ---- what a connector that only reads need not do

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        return

    def wait_for_save(self) -> None:
        return


def check_engine(vllm_config: Any) -> None:
    """Raises InputError at start for a setting under which prefixes would be lost, rounded or silently wrong."""
    model, parallel, cache = vllm_config.model_config, vllm_config.parallel_config, vllm_config.cache_config
    dtype = str(model.dtype).removeprefix("torch.")
    trouble = {
        "latent attention (MLA) keeps no keys and values": model.use_mla,
        f"a cache of {cache.cache_dtype} would round the prefix; use auto": cache.cache_dtype not in ("auto", dtype),
        "pipeline parallelism is not supported": parallel.pipeline_parallel_size > 1,
        "context parallelism is not supported": getattr(parallel, "decode_context_parallel_size", 1) > 1
        or getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "speculative decoding is not supported": vllm_config.speculative_config is not None,
        "kv_load_failure_policy must be fail, or refused requests would be answered from their placeholders": (
            vllm_config.kv_transfer_config.kv_load_failure_policy != "fail"
        ),
    }
    for reason, holds in trouble.items():
        if holds:
            raise InputError(f"foreword cannot serve prefixes here: {reason}.")


def _shape(kv_cache_config: Any, group: int, name: str) -> CacheLayer:
    spec = kv_cache_config.kv_cache_groups[group].kv_cache_spec
    spec = getattr(spec, "kv_cache_specs", {}).get(name, spec)
    value_size = spec.head_size_v if spec.head_size_v is not None else spec.head_size
    return CacheLayer(spec.num_kv_heads, spec.head_size, value_size)
