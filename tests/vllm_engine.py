"""Runs inside the environment that has vLLM: generates greedily as a job file says, and writes what came out.

    python tests/vllm_engine.py job.json result.json

A job: {"model", "prefixes", "base", "engine": {...}, "max_tokens", "batches": [[request, ...], ...]}; a request:
{"ids", "prefix": name or null} or, to misbehave, with "prompt", "params", "salt", "prompt_logprobs" as they are sent.
The result, per batch: {"batches": [[{"ids", "reason", "logprob"}, ...], ...], "seconds": [...], "metrics": [...]}.
"""

import json
import sys
import time
from pathlib import Path

from vllm import LLM, CompletionOutput, SamplingParams

from foreword.interop.vllm import requests
from foreword.interop.vllm.prefixes import PrefixFolder


def prompt_and_sampling(request: dict, folder: PrefixFolder, max_tokens: int) -> tuple[dict, SamplingParams]:
    ids, params, salt = request["ids"], request.get("params"), request.get("salt")
    if request.get("prefix"):
        found = folder.find(request["prefix"])
        wanted = requests.Wanted(found.name, found.digest, 3)
        ids = requests.with_placeholders(ids, found.length, 3)
        params, salt = requests.transfer_params(wanted), requests.salt(found.name, found.digest)
    prompt = {"prompt_token_ids": request.get("prompt", ids)}
    if salt:
        prompt["cache_salt"] = request.get("salt", salt)
    sampling = SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        logprobs=0,
        prompt_logprobs=request.get("prompt_logprobs"),
        extra_args={"kv_transfer_params": params} if params else None,
    )
    return prompt, sampling


def told(output: CompletionOutput) -> dict:
    """Tokens, why they ended, and the first one's log-probability."""
    ids = list(output.token_ids)
    first = output.logprobs[0][ids[0]].logprob if ids else None
    return {"ids": ids, "reason": output.finish_reason, "logprob": first}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    config = requests.connector_config(job["prefixes"], job["base"])
    llm = LLM(
        model=job["model"],
        kv_transfer_config=config,
        enforce_eager=True,
        disable_log_stats=False,
        skip_tokenizer_init=True,
        seed=0,
        **job["engine"],
    )
    folder = PrefixFolder(job["prefixes"])
    batches, seconds, metrics = [], [], []
    for batch in job["batches"]:
        pairs = [prompt_and_sampling(request, folder, job["max_tokens"]) for request in batch]
        begun = time.perf_counter()
        outputs = llm.generate([p for p, _ in pairs], [s for _, s in pairs], use_tqdm=False)
        seconds.append(time.perf_counter() - begun)
        batches.append([told(output.outputs[0]) for output in outputs])
        metrics.append({m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")})
    Path(sys.argv[2]).write_text(json.dumps({"batches": batches, "metrics": metrics, "seconds": seconds}))


if __name__ == "__main__":
    main()
