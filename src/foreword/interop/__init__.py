"""Prefixes in other libraries' hands: PEFT both ways, and vLLM."""
