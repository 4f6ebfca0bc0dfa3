"""BLEU, NIST, METEOR, ROUGE-L and CIDEr of generated texts, as the E2E challenge's tool e2e-metrics computes them.

BLEU and NIST are those of mteval-v13a: its tokens, in lower case, n-grams clipped by the closest of all references.
METEOR (by Java), ROUGE-L and CIDEr are MS COCO's, of the Penn Treebank's tokens without punctuation: pycocoevalcap, in
`pip install ".[bench]"`, has the code and the jars that the tool has.

    python benchmarks/e2e_metrics.py REFERENCES OUTPUTS

takes two files in the tool's own form: an output a line; a reference a line, with an empty line between two tables.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase
from unittest.mock import patch

from sacrebleu.metrics import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

References = Sequence[Sequence[str]]  # of each text
Ngram = tuple[str, ...]
LONGEST = 5  # n-grams of NIST
DECAY = -math.log(0.5) / math.log(1.5) ** 2  # NIST's penalty is 0.5 where a text has 2/3 of the references' words
TOKENS = Tokenizer13a()
CAPITALS = str.maketrans(ascii_uppercase, ascii_lowercase)


def e2e_metrics(texts: Sequence[str], references: References) -> dict[str, float]:
    """The five figures over all texts, each with one reference or more; all but NIST and CIDEr from 0 to 1."""
    return {"bleu": bleu(texts, references), "nist": nist(texts, references), **coco_metrics(texts, references)}


def bleu(texts: Sequence[str], references: References) -> float:
    most = max(map(len, references))
    streams = [[lowered(row[i]) if i < len(row) else None for row in references] for i in range(most)]
    return BLEU(tokenize="13a", force=True).corpus_score([lowered(text) for text in texts], streams).score / 100


def nist(texts: Sequence[str], references: References) -> float:
    """Doddington (2002): for each n the mean information of the n-grams shared with a reference, in bits.

    The tool fills up the references of a table to as many as the largest table has, with empty ones that count in the
    mean length of a reference. So do we.
    """
    made = [words(text) for text in texts]
    known = [[words(text) for text in row] for row in references]
    counts = counted(known)
    score = sum(shared_information(made, known, counts, n) for n in range(1, LONGEST + 1))
    length = counts[()] / max(map(len, known))
    ratio = sum(map(len, made)) / length
    return score * math.exp(-DECAY * math.log(min(ratio, 1.0)) ** 2) if ratio else 0.0


def words(text: str) -> list[str]:
    return TOKENS(lowered(" ".join(text.split()))).split()


def lowered(text: str) -> str:
    """ASCII's capitals alone, as mteval-v13a."""
    return text.translate(CAPITALS)


def ngrams(text: Sequence[str], n: int) -> Counter[Ngram]:
    return Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))


def counted(references: Sequence[Sequence[list[str]]]) -> Counter[Ngram]:
    """How often each n-gram is in all references together; the empty one as often as there are words."""
    counts: Counter[Ngram] = Counter()
    for text in (text for row in references for text in row):
        counts[()] += len(text)
        for n in range(1, LONGEST + 1):
            counts.update(ngrams(text, n))
    return counts


def shared_information(
    texts: Sequence[list[str]], references: Sequence[Sequence[list[str]]], counts: Counter[Ngram], n: int
) -> float:
    """Bits per n-gram of the texts: of a shared one, how much rarer it is than its first n - 1 words."""
    bits, total = 0.0, 0
    for text, row in zip(texts, references, strict=True):
        most: Counter[Ngram] = Counter()
        for reference in row:
            most |= ngrams(reference, n)
        own = ngrams(text, n)
        bits += sum(times * math.log2(counts[gram[:-1]] / counts[gram]) for gram, times in (own & most).items())
        total += own.total()
    return bits / max(total, 1)


def coco_metrics(texts: Sequence[str], references: References) -> dict[str, float]:
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # Java reads what is piped to it in the locale's encoding.
    with patch.dict(os.environ, {"JAVA_TOOL_OPTIONS": "-Dfile.encoding=UTF-8"}):
        scorers = {"meteor": Meteor(), "rouge_l": Rouge(), "cider": Cider()}
        tokens = PTBTokenizer()
        known = tokens.tokenize({i: [caption(text) for text in row] for i, row in enumerate(references)})
        made = tokens.tokenize({i: [caption(text)] for i, text in enumerate(texts)})
    return {name: float(scorer.compute_score(known, made)[0]) for name, scorer in scorers.items()}


def caption(text: str) -> dict[str, str]:
    """On one line, and never empty: an empty line would be dropped, a full stop leaves no words either."""
    return {"caption": " ".join(text.split()) or "."}


def missing() -> str | None:
    """What this machine lacks, or None."""
    try:
        import pycocoevalcap  # noqa: F401
    except ImportError:
        return 'pycocoevalcap is not installed; pip install ".[bench]"'
    return None if shutil.which("java") else "METEOR and the tokenizer need Java, and there is none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("references", type=Path)
    parser.add_argument("outputs", type=Path)
    arguments = parser.parse_args()
    if lacks := missing():
        parser.error(lacks)
    blocks = arguments.references.read_text(encoding="utf-8").strip().split("\n\n")
    outputs = arguments.outputs.read_text(encoding="utf-8").strip().split("\n")
    print(json.dumps(e2e_metrics(outputs, [block.strip().split("\n") for block in blocks])))


if __name__ == "__main__":
    main()
