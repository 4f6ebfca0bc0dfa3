"""The conformance suite: every form, on every model family, for every property."""
