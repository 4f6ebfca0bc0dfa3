"""Prefixes on unmodified vLLM. `connector` runs inside the engine, `gateway` in front of it; the rest needs no vLLM."""
