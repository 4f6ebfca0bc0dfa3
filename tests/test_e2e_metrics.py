"""benchmarks/e2e_metrics.py: figures as the E2E challenge's tool gives them.

Those of BLEU and NIST below are of the arithmetic of its Perl script (mteval-v13a), run on the same sentences.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

TEXTS = ["The Anchor is a family-friendly café near the old harbour.", "It costs £20-25, not 4.50!", "A quiet pub."]
REFERENCES = [
    [
        "The Anchor is a café for families, near the harbour.",
        "Near the old harbour there is a family-friendly café, The Anchor.",
        "The Anchor, a café, is near the harbour.",
    ],
    ["It costs £20-25 and not £4.50.", "It is not 4.50, it costs £20-25!"],
    ["A quiet pub near the river."],
]
SINGLE = [row[:1] for row in REFERENCES]


@pytest.fixture(scope="module")
def metrics() -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / "e2e_metrics.py"
    spec = importlib.util.spec_from_file_location("e2e_metrics", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("references", "bleu", "nist"), [(REFERENCES, 0.540866, 5.510778), (SINGLE, 0.345163, 3.202306)]
)
def test_bleu_and_nist_are_mtevals(metrics: ModuleType, references: list[list[str]], bleu: float, nist: float) -> None:
    assert metrics.bleu(TEXTS, references) == pytest.approx(bleu, abs=1e-6)
    assert metrics.nist(TEXTS, references) == pytest.approx(nist, abs=1e-6)


def test_tokens_are_mtevals(metrics: ModuleType) -> None:
    text = "The CAFÉ's family-friendly, £4.50 (5-star) &amp; cheap."
    tokens = ["the", "cafÉ's", "family-friendly", ",", "£4.50", "(", "5", "-", "star", ")", "&", "cheap", "."]
    assert metrics.words(text) == tokens


def test_two_thirds_of_the_words_halve_nist(metrics: ModuleType) -> None:
    whole, short = metrics.nist(["a b c d e f"], [["a b c d e f"]]), metrics.nist(["a b c d"], [["a b c d e f"]])
    # All words are equally rare, and every longer n-gram is certain once its first words are known.
    assert short == pytest.approx(whole / 2)


def test_nothing_written_scores_nothing(metrics: ModuleType) -> None:
    assert metrics.nist(["", ""], [["a b"], ["c"]]) == 0.0


def test_all_five_figures(metrics: ModuleType) -> None:
    """METEOR, ROUGE-L and CIDEr of pycocoevalcap 1.2, whose tokenizer and jar are the tool's own."""
    if lacks := metrics.missing():
        pytest.skip(lacks)
    texts = ["", *TEXTS]  # nothing written of the first, and as many lines for Java all the same
    references = [["Nothing is written of the first."], *REFERENCES]
    expected = {"bleu": 0.404037, "nist": 5.645071, "meteor": 0.395696, "rouge_l": 0.576777, "cider": 3.366400}
    assert metrics.e2e_metrics(texts, references) == pytest.approx(expected, abs=1e-6)
