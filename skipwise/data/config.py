"""Texts that papers on long contexts evaluate on, by a short name."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Strict, model_validator

from skipwise.errors import UserError, nearest
from skipwise.utils.settings import Length, Number, Section, Share

PREFIX = "preset:"
# The files the PoSE authors evaluated on (GovReport through SCROLLS, Proof-pile, PG-19), as they published them.
_AUTHORS = {"source": "dwzhu/PoSE-Datasets", "split": "train"}  # a single file is a split of this name
PRESETS: dict[str, dict[str, Any]] = {
    "gov-report": {**_AUTHORS, "data_files": "scrolls/gov_report/test_long.jsonl", "text_field": "input"},
    "proof-pile": {**_AUTHORS, "data_files": "proof-pile/test.jsonl"},
    "pg19": {**_AUTHORS, "data_files": "pile/test_pg19.jsonl"},
}


def expand_preset(source: dict[str, Any]) -> dict[str, Any]:
    """A source with its preset written out; any other as it is. What is given beside the preset wins.

    Raises:
        UserError: for a preset that does not exist.
    """
    name = source.get("source")
    if not isinstance(name, str) or not name.startswith(PREFIX):
        return source
    name = name.removeprefix(PREFIX)
    if name not in PRESETS:
        raise UserError(f"There is no preset {name!r}.{nearest(name, PRESETS)}", code="unknown_preset")
    return PRESETS[name] | {key: value for key, value in source.items() if key != "source"}


class SourceConfig(Section):
    """One source of documents.

    Attributes:
        source: file, directory, hub dataset name, `builtin:python`, or a preset: `preset:gov-report`,
            `preset:proof-pile`, `preset:pg19`.
        weight: relative share of the training windows drawn from it.
        text_field: name of the text column in JSONL, Parquet and hub datasets.
        messages_field: name of a column of conversations instead: lists of messages with `role` and `content`, written
            with the tokenizer's chat template. There the loss is on what the assistant says.
        split: of a hub dataset.
        subset: of a hub dataset that has several (its configuration name).
        data_files: of a hub dataset, to read some of its files only.
        revision: of a hub dataset; name one to be sure of what is read.
        max_documents: read no more than this many; a stream larger than the disk is cut with it.
    """

    source: str
    weight: Annotated[Number, Field(gt=0.0)] = 1.0
    text_field: str = "text"
    messages_field: str | None = None
    split: str = "train"
    subset: str | None = None
    data_files: str | None = None
    revision: str | None = None
    max_documents: Annotated[int, Field(ge=1)] | None = None


class DocumentsConfig(Section):
    """Documents, some of them held out by the hash of their text.

    Attributes:
        sources: one or more; a single one may be written as `source: docs.jsonl`.
        held_out_share: share of the documents that evaluation sees; 1 for all of them, where nothing was trained on
            them.
        short_documents: leave documents as they are (`skip` those that are too short), or `join` neighbours with
            end-of-text tokens between.
        max_malformed_share: stop when more of a source's records than this cannot be read.
    """

    sources: Annotated[
        tuple[
            Annotated[SourceConfig, BeforeValidator(lambda v: _source(v), json_schema_input_type=SourceConfig | str)],
            ...,
        ],
        Strict(False),
    ]
    held_out_share: Annotated[Number, Field(gt=0.0, le=1.0)] = 1.0
    short_documents: Literal["skip", "join"] = "skip"
    max_malformed_share: Share = 0.01

    @model_validator(mode="before")
    @classmethod
    def _shorthands(cls, value: object) -> object:
        """One `source` for a list of one; `text_field`, `messages_field` and `split` here for all."""
        if isinstance(value, str):
            return {"sources": [value]}
        if not isinstance(value, Mapping):
            return value
        if "source" in value and "sources" in value:
            raise UserError("data takes either `source` or `sources`, not both.", code="source_and_sources")
        shared = {key: value[key] for key in ("text_field", "messages_field", "split") if key in value}
        rest = {key: value[key] for key in value if key not in (*shared, "source")}
        sources = [value["source"]] if "source" in value else value.get("sources")
        if not isinstance(sources, list | tuple):
            return rest | shared
        named = [_source(source) for source in sources]
        return rest | {"sources": [{**shared, **one} if isinstance(one, Mapping) else one for one in named]}

    @model_validator(mode="after")
    def _not_empty(self) -> "DocumentsConfig":
        if not self.sources:
            raise UserError("data.sources must name at least one source. Give --data PATH.", code="no_sources")
        return self


class DataConfig(DocumentsConfig):
    """What is trained and evaluated on.

    Attributes:
        held_out_share: share of the documents kept for evaluation.
        min_document_tokens: shorter documents are skipped; None for what the sampler needs.
        retrieval_share: share of the training windows that are synthetic retrieval documents (facts
            hidden in text and asked for later, with the loss on the answer). Text alone makes
            a model forget how to retrieve.
    """

    held_out_share: Annotated[Number, Field(gt=0.0, lt=1.0)] = 0.05
    min_document_tokens: Length | None = None
    retrieval_share: Share = 0.25


def _source(value: object) -> object:
    named = {"source": value} if isinstance(value, str) else value
    return expand_preset(dict(named)) if isinstance(named, Mapping) else named
