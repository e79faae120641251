"""Words that were this project's own, and what is said instead: none of them comes back into code or pages."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [
    *sorted((ROOT / "skipwise").rglob("*.py")),
    *sorted((ROOT / "experiments").glob("*.py")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
]
# Where the old names are told, as names of what was there.
TOLD = {"docs/decisions.md"}
PRIVATE = {
    r"workbench\w*|\bbench\b": "run context",
    r"\bpart \{|\bpart \d of": "step of a run",
    r"\bledger\b": "evaluation directory",
    r"\b(Compared|Subject|Setting)\b": "model argument, model under test, evaluation context",
    r"\bslides?\b": "sliding window",
    r"\b(aids|aided)\b": "training-free methods",
    r"\b(mend|mended|mends)\b": "fix, fixed",
    r"\bdoubts\b": "warnings",
    r"\b(recompute_activations|speedups)\b": "activation checkpointing, kernels",
    r"\bdigests?\b": "hash",
    r"\bfirst windows?\b": "original window",
    r"\bdtype of (the )?(matrix )?products\b": "compute dtype",
}
# A method of hashlib, of PyTorch's or of a message; a key of a file that was written before; a name of results.
ALLOWED = re.compile(
    r"Makefile bench|Compared with|mended the blue coat|slides a window|hexdigest|file_digest|\"aid\"|results/aids"
    r"|study-aids|studies/aids|train_speedup|digest `"
)


@pytest.mark.parametrize("pattern", PRIVATE)
def test_private_words_are_gone(pattern: str) -> None:
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for file in FILES
        if str(file.relative_to(ROOT)) not in TOLD
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if re.search(pattern, line) and not ALLOWED.search(line)
    ]
    assert found == [], f"say: {PRIVATE[pattern]}"
