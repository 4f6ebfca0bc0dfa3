"""What a request for a prefix says, and who may say it: placeholder tokens, transfer parameters and a cache salt.

    prompt              P placeholder tokens + the text's tokens
    kv_transfer_params  {"foreword": {"prefix": name, "digest": sha256, "placeholder": token}}
    cache_salt          foreword:name:digest

The salt keeps blocks apart: placeholders look alike, so without it one prefix's blocks would serve another. It holds
the digest of the content, so that a prefix that was trained again misses. Only the front writes these fields; the
engine's side checks them against each other (`refusal`), and what a client set is dropped (`rewrite`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import InputError

MARK = "foreword"
# Set by the front alone: these choose what is read from the cache, or what else reaches the engine.
DROPPED = ("kv_transfer_params", "ec_transfer_params", "cache_salt", "vllm_xargs", "kv_hints", "session_id")
# They would skip the cache, and with it the prefix, or change the placeholders.
REFUSED = ("prompt_logprobs", "echo", "prompt_embeds", "truncate_prompt_tokens", "suffix", "use_beam_search")
FORWARDED = frozenset(
    "model prompt max_tokens temperature top_p n stream stream_options stop seed logprobs presence_penalty user top_k "
    "frequency_penalty logit_bias min_p repetition_penalty ignore_eos min_tokens stop_token_ids skip_special_tokens "
    "include_stop_str_in_output spaces_between_special_tokens allowed_token_ids bad_words response_format priority "
    "structured_outputs".split()
)


@dataclass(frozen=True)
class Wanted:
    """The prefix that a request names."""

    prefix: str
    digest: str
    placeholder: int


def salt(prefix: str, digest: str) -> str:
    return f"{MARK}:{prefix}:{digest}"


def transfer_params(wanted: Wanted) -> dict[str, Any]:
    """`kv_transfer_params` of a request for a prefix."""
    fields = {"prefix": wanted.prefix, "digest": wanted.digest, "placeholder": wanted.placeholder}
    return {MARK: fields}


def with_placeholders(ids: Sequence[int], length: int, placeholder: int) -> list[int]:
    """The prompt: `length` placeholders before the text's ids. Raises InputError for an empty text."""
    if not ids:
        raise InputError("the prompt is empty; write at least one word.")
    return [placeholder] * length + list(ids)


def wanted_by(params: dict[str, Any] | None) -> Wanted | None:
    """What `kv_transfer_params` asks for; None where it is not ours. Raises InputError where it is malformed."""
    if not params or MARK not in params:
        return None
    given = params[MARK]
    if not isinstance(given, dict) or given.keys() != {"prefix", "digest", "placeholder"}:
        raise InputError("the transfer parameters are malformed.")
    wanted = Wanted(**given)
    if not (isinstance(wanted.prefix, str) and isinstance(wanted.digest, str) and type(wanted.placeholder) is int):
        raise InputError("the transfer parameters are malformed.")
    return wanted


def refusal(wanted: Wanted | None, length: int, ids: Sequence[int] | None, given_salt: str | None) -> str | None:
    """Why a request may not read the prefix of `length` tokens that it wants; None where it may."""
    if wanted is None:
        if given_salt is not None and given_salt.startswith(f"{MARK}:"):
            return "its cache salt is a prefix's and it names none"
        return None
    if given_salt != salt(wanted.prefix, wanted.digest):
        return "its cache salt is not that of the prefix it names"
    if ids is None or len(ids) <= length:
        return f"its prompt has no text behind {length} placeholders"
    if any(i != wanted.placeholder for i in ids[:length]):
        return f"its prompt does not begin with {length} placeholders"
    return None


def rewrite(
    body: dict[str, Any], wanted: Wanted | None, length: int, encode: Callable[[str], list[int]], served: str
) -> dict[str, Any]:
    """The body of a completion request for the engine, which serves its model as `served`.

    The prompt becomes ids, behind placeholders where a prefix is wanted. Raises InputError naming a field that is
    unknown or that cannot go with a prefix.
    """
    kept = {k: v for k, v in body.items() if k not in DROPPED and v is not None and v is not False}
    for name in REFUSED if wanted else ():
        if name in kept:
            raise InputError(f"{name} cannot be asked for with a prefix.")
    unknown = sorted(kept.keys() - FORWARDED - set(REFUSED))
    if unknown:
        raise InputError(f"the field {unknown[0]} is unknown.")
    kept["model"] = served
    if wanted is None:
        return kept
    kept["prompt"] = [
        with_placeholders(ids, length, wanted.placeholder) for ids in prompt_ids(body.get("prompt"), encode)
    ]
    kept["kv_transfer_params"], kept["cache_salt"] = transfer_params(wanted), salt(wanted.prefix, wanted.digest)
    return kept


def prompt_ids(prompt: Any, encode: Callable[[str], list[int]]) -> list[list[int]]:
    """Token ids of every prompt: a text, several, a list of ids, or several lists."""
    if isinstance(prompt, str):
        return [encode(prompt)]
    if isinstance(prompt, list) and prompt:
        if all(type(item) is int for item in prompt):
            return [prompt]
        if all(isinstance(item, str) for item in prompt):
            return [encode(item) for item in prompt]
        if all(isinstance(item, list) and all(type(i) is int for i in item) for item in prompt):
            return prompt
    raise InputError("the prompt must be a text, texts, token ids or lists of token ids.")


def without_placeholders(content: dict[str, Any], length: int, prompts: int, model: str) -> dict[str, Any]:
    """An answer or a streamed part of one, under the requested name, its usage without the placeholders."""
    usage = content.get("usage")
    if not usage or not length:
        return {**content, "model": model}
    hidden = length * prompts
    usage = {**usage, "prompt_tokens": usage["prompt_tokens"] - hidden, "total_tokens": usage["total_tokens"] - hidden}
    details = usage.get("prompt_tokens_details")
    if details and details.get("cached_tokens"):
        cached = max(0, details["cached_tokens"] - hidden)
        usage["prompt_tokens_details"] = {**details, "cached_tokens": cached}
    return {**content, "model": model, "usage": usage}


def connector_config(prefixes: str, base: str) -> dict[str, Any]:
    """What `vllm serve --kv-transfer-config` takes: the folder of prefixes, and the base's name in their headers."""
    return {
        "kv_connector": "ForewordConnector",
        "kv_connector_module_path": "foreword.interop.vllm.connector",
        "kv_role": "kv_consumer",
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": {"prefixes": prefixes, "base": base},
    }
