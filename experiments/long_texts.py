"""Long texts as documents for experiments: a development part and a reported part of each source.

    python -m experiments.long_texts OUTPUT TEXTS.jsonl... [--characters 20000]

Every file is a domain; its lines have a `title` and a `text`. A text is cut at line ends into documents of about so
many characters; the first third of them goes to OUTPUT/<domain>-development.jsonl, the others to
OUTPUT/<domain>.jsonl, and a document where the two meet to neither. Titles and hashes of the texts are printed.
"""

import argparse
import hashlib
import json
from pathlib import Path


def documents_of(text: str, characters: int) -> list[str]:
    """Pieces of about `characters` that end with a line; a short rest is left out."""
    documents, current, size = [], list[str](), 0
    for line in text.splitlines(keepends=True):
        current.append(line)
        size += len(line)
        if size >= characters:
            documents.append("".join(current))
            current, size = [], 0
    return documents


def main() -> None:
    """Write both parts of every file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--characters", type=int, default=20_000, help="of a document, about")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for path in arguments.texts:
        parts: dict[str, list[str]] = {"-development": [], "": []}
        for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n"):
            record = json.loads(line)
            documents = documents_of(record["text"], arguments.characters)
            third = len(documents) // 3
            parts["-development"] += documents[:third]
            parts[""] += documents[third + 1 :] if third else documents
            content_hash = hashlib.sha256(record["text"].encode()).hexdigest()
            print(f"{path.stem}: {record['title']}, {len(documents)} documents, sha256 {content_hash}")
        for suffix, own in parts.items():
            lines = "".join(json.dumps({"text": text}) + "\n" for text in own)
            (arguments.output / f"{path.stem}{suffix}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
