"""The sources of a configuration, tokenised, with a word to the user about each."""

import time

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from skipwise.config import DocumentsConfig
from skipwise.data.store import TokenStore, is_stored, open_store

# In a log, where no line can be changed.
SECONDS_BETWEEN_LINES = 60.0


def open_sources(data: DocumentsConfig, tokenizer: PreTrainedTokenizerBase, console: Console) -> list[TokenStore]:
    """The store of each source; what is not there yet is built."""
    return [_open(data, index, tokenizer, console) for index in range(len(data.sources))]


def _open(data: DocumentsConfig, index: int, tokenizer: PreTrainedTokenizerBase, console: Console) -> TokenStore:
    source = data.sources[index]
    with console.status(Text(f"tokenising {source.source}")) as status:
        last_line = time.monotonic()

        def progress(documents: int, tokens: int) -> None:
            nonlocal last_line
            line = Text(f"tokenising {source.source}: {documents:,} documents, {tokens:,} tokens")
            status.update(line)
            if not console.is_terminal and time.monotonic() - last_line >= SECONDS_BETWEEN_LINES:
                last_line = time.monotonic()
                console.print(line, highlight=False)

        if not console.is_terminal and not is_stored(source, data, tokenizer):
            console.print(f"tokenising {source.source}", highlight=False)
        store = open_store(source, data, tokenizer, progress)
    report = store.summary["report"]
    train, held_out = store.summary["train"], store.summary["held_out"]
    counts = (
        f"{held_out['tokens']:,} tokens in {held_out['documents']:,} documents"
        if data.held_out_share == 1
        else f"{train['tokens']:,} tokens in {train['documents']:,} documents to train on, "
        f"{held_out['documents']:,} held out by {store.summary['split_by']}"
    )
    malformed = f"; {report['malformed']} of {report['records']} records malformed" if report["malformed"] else ""
    console.print(f"{source.source}: {counts}{malformed}", highlight=False)
    for example in report["examples"]:
        console.print(f"  skipped {example}", highlight=False)
    return store
