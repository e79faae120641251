"""From documents to batches."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from skipwise import Document, FullLength, Lengths, LongRecipe, Plain, PoSE, UserError, WindowCollator, sentences_of
from skipwise.data.retrieval import RetrievalDocuments, near_miss
from skipwise.data.store import Documents
from skipwise.data.windows import Source, TrainingExamples, cut_spans
from skipwise.evaluation.passkey import FILLER, NEEDLE, QUESTION, TASK
from skipwise.positions import PositionSampler, example_rng

LENGTHS = Lengths(original=64, train=32, target=256)


def documents(lengths: list[int]) -> Documents:
    """Tokens count up, with one separator between documents."""
    starts = np.cumsum([0, *[n + 1 for n in lengths]])[:-1]
    return Documents(np.arange(sum(lengths) + len(lengths)), starts, starts + lengths)


def test_pieces_cover_a_document_without_overlap() -> None:
    spans = cut_spans(documents([100, 31, 32, 70]), needed=32, used=32, join=False)
    assert spans.tolist() == [[0, 32], [32, 64], [64, 96], [133, 165], [166, 198], [198, 230]]


def test_a_rest_is_used_when_it_is_long_enough() -> None:
    assert cut_spans(documents([100]), needed=32, used=64, join=False).tolist() == [[0, 64], [64, 100]]


def test_short_documents_can_be_joined() -> None:
    assert cut_spans(documents([20, 20, 20]), needed=32, used=32, join=False).tolist() == []
    assert cut_spans(documents([20, 20, 20]), needed=31, used=31, join=True).tolist() == [[0, 31], [31, 62]]


def test_the_shortest_document_counts_before_cutting() -> None:
    assert len(cut_spans(documents([100, 200]), 32, 32, False, shortest=150)) == 6


def two_sources(count: int, seed: int = 0) -> TrainingExamples:
    first, second = documents([320]), documents([96])
    second = Documents(second.tokens + 1000, second.starts, second.stops)
    return TrainingExamples(
        [Source(first, cut_spans(first, 32, 32, False), 3.0), Source(second, cut_spans(second, 32, 32, False), 1.0)],
        count,
        seed,
    )


def test_sources_are_mixed_by_weight_and_every_epoch_visits_every_piece() -> None:
    examples = [two_sources(2000)[i] for i in range(2000)]
    share = np.mean([example["input_ids"][0] >= 1000 for example in examples])
    assert share == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 2000) ** 0.5)
    first = [example for example in examples if example["input_ids"][0] < 1000]
    for epoch in range(3):
        of_epoch = first[10 * epoch : 10 * epoch + 10]
        assert {e["visit"][0] for e in of_epoch} == {epoch}
        assert {int(e["input_ids"][0]) for e in of_epoch} == set(range(0, 320, 32))
    orders = [[int(e["input_ids"][0]) for e in first[k : k + 10]] for k in (0, 10)]
    assert orders[0] != orders[1]


def test_an_example_is_the_same_whoever_asks_and_in_any_order() -> None:
    forward, backward = two_sources(200), two_sources(200)
    late = {i: backward[i] for i in reversed(range(200))}
    for i in range(200):
        example = forward[i]
        assert (example["input_ids"] == late[i]["input_ids"]).all()
        assert example["visit"] == late[i]["visit"]


def test_skips_are_drawn_anew_at_every_visit() -> None:
    """Trap 3. Seen to fail when the epoch was left out of the visit."""
    examples = two_sources(400)
    collator = WindowCollator(PoSE(), LENGTHS)
    positions: dict[tuple[int, int], list[list[int]]] = {}
    for i in range(400):
        _epoch, span, source = examples[i]["visit"]
        positions.setdefault((source, span), []).append(collator([examples[i]])["position_ids"][0].tolist())
    for visits in positions.values():
        assert len(visits) > 10
        assert len({tuple(ids) for ids in visits}) > 0.9 * len(visits)


@pytest.mark.parametrize("workers", [0, 2])
def test_windows_do_not_depend_on_workers(workers: int) -> None:
    loader = DataLoader(two_sources(24), batch_size=4, num_workers=workers, collate_fn=WindowCollator(PoSE(), LENGTHS))
    ids = torch.cat([batch["position_ids"] for batch in loader])
    alone = [WindowCollator(PoSE(), LENGTHS)([two_sources(24)[i]])["position_ids"] for i in range(24)]
    assert torch.equal(ids, torch.cat(alone))


def test_without_a_visit_torch_seeds_the_draw() -> None:
    """For other people's data sets: fresh at every call, repeatable by torch's seed."""
    collator, feature = WindowCollator(PoSE(), LENGTHS), {"input_ids": list(range(32))}
    torch.manual_seed(5)
    first, second = (collator([feature] * 4)["position_ids"] for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(first, collator([feature] * 4)["position_ids"])
    assert not torch.equal(first, second)
    assert len({tuple(row.tolist()) for row in first}) > 1


def test_without_a_visit_processes_that_are_seeded_alike_draw_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    collator = WindowCollator(PoSE(), Lengths(original=32, train=32, target=1024))
    drawn = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        torch.manual_seed(5)
        drawn.append(collator([{"input_ids": list(range(32))}] * 4)["position_ids"])
    assert not torch.equal(*drawn)


def test_a_batch_has_what_a_model_needs() -> None:
    """Trap 7: ids stay integers, since bfloat16 is wrong past 256. Seen to fail when they were made bfloat16."""
    batch = WindowCollator(PoSE(), LENGTHS)(
        [{"input_ids": list(range(100, 140)), "scored": [False] * 20 + [True] * 20}] * 3
    )
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == dict.fromkeys(
        ("input_ids", "position_ids", "labels", "attention_mask"), ((3, 32), torch.int64)
    )
    assert (batch["attention_mask"] == 1).all()
    assert (batch["position_ids"][:, 0] == 0).all()
    assert torch.equal(batch["labels"], batch["input_ids"].where(batch["input_ids"] >= 120, -100))


def test_gaps_in_the_text_are_marked() -> None:
    document = {"input_ids": list(range(200))}
    collator = WindowCollator(PoSE(content="uniform"), LENGTHS, mark_text=True)
    batch = collator([document] * 50)
    runs_on = batch["input_ids"] - batch["input_ids"][:, :1] == torch.arange(32)
    assert torch.equal(batch["text_runs_on"], runs_on)
    assert not runs_on.all(dim=1).all()
    short = {"input_ids": list(range(32)), "scored": [True] * 32}  # of such documents nothing is cut out
    assert collator([short] * 20)["text_runs_on"].all()
    assert WindowCollator(PoSE(), LENGTHS, mark_text=True)([document] * 20)["text_runs_on"].all()


def test_untouched_windows() -> None:
    collator = WindowCollator(PoSE(), LENGTHS, untouched_share=0.5)
    features = [{"input_ids": list(range(32)), "visit": (0, i, 0)} for i in range(400)]
    ids = collator(features)["position_ids"]
    untouched = (ids == torch.arange(32)).all(dim=1).float().mean()
    assert 0.4 < float(untouched) < 0.62
    full = WindowCollator(FullLength(), LENGTHS, untouched_share=0.5)
    assert full([{"input_ids": list(range(256))}] * 8)["input_ids"].shape == (8, 256)


def test_echoes_follow_the_skips() -> None:
    features = [{"input_ids": list(range(32)), "visit": (0, i, 0)} for i in range(800)]
    batch = WindowCollator(PoSE(), Lengths(64, 32, 4096), untouched_share=0.5, echo_share=0.5)(features)
    assert batch["attention_mask"].shape == (800, 1, 32, 32)
    skipped = (batch["position_ids"] != torch.arange(32)).any(dim=1)
    ordinary = torch.full((32, 32), -torch.inf).triu(1)
    echoing = (batch["attention_mask"][:, 0] != ordinary).flatten(1).any(dim=1)
    assert not echoing[~skipped].any()  # nothing is missing there
    # One of two blocks (or of one, for a cut in the first) echoes in 60 % of the masks, and every second may.
    assert 0.22 < float(echoing[skipped].float().mean()) < 0.38


@pytest.mark.parametrize("sampler", [PoSE(), Plain(), FullLength()])
def test_without_echoes_the_mask_is_the_cheap_one(sampler: PositionSampler) -> None:
    share = 0.0 if sampler == PoSE() else 1.0
    batch = WindowCollator(sampler, LENGTHS, echo_share=share)([{"input_ids": list(range(256))}] * 4)
    assert batch["attention_mask"].dtype == torch.int64
    assert batch["attention_mask"].shape == batch["input_ids"].shape


def test_a_document_that_is_too_short_is_an_error() -> None:
    with pytest.raises(UserError, match="at least 32 tokens, but feature 0 of a batch has 31"):
        WindowCollator(Plain(), LENGTHS)([{"input_ids": list(range(31))}])


def retrieval(tokenizer: PreTrainedTokenizerFast) -> RetrievalDocuments:
    return RetrievalDocuments(
        encode=lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        bos=[0],
        special=frozenset([0, 1]),
        vocabulary_size=258,
        prose=lambda rng, n: rng.integers(100, 200, size=n),
    )


@pytest.mark.parametrize("length", [32, 64, 256, 1024])
def test_retrieval_documents_can_be_known_from_what_stands_before(
    tokenizer: PreTrainedTokenizerFast, length: int
) -> None:
    """The answer, and the token right before it, stand in the document already."""
    draw = retrieval(tokenizer).draw
    for index in range(100):
        tokens, scored = draw(length, example_rng(0, 0, index))
        assert tokens.shape == scored.shape == (length,)
        assert scored.any()
        assert not scored[:4].any()
        assert tokens[0] == 0
        edges = np.flatnonzero(np.diff(np.append(scored, False)))  # last token before an answer, last one of it, ...
        for before, last in edges.reshape(-1, 2):
            known = tokens[before:last].tolist()  # the full stop after an answer may be new
            assert any(tokens[i : i + len(known)].tolist() == known for i in range(before)), tokenizer.decode(tokens)


def test_the_answer_is_that_of_the_question(tokenizer: PreTrainedTokenizerFast) -> None:
    """What followed the longest earlier match of the question is the answer, nearly always: keys may be equal."""
    draw, right = replace(retrieval(tokenizer), copies_share=0.0).draw, []
    for index in range(100):
        tokens, scored = draw(256, example_rng(2, 0, index))
        for start in np.flatnonzero(scored[1:] & ~scored[:-1]) + 1:
            lengths = [_match(tokens, i, start) for i in range(1, start)]
            place = 1 + int(np.argmax(lengths))
            answer = tokens[start : start + 3][scored[start : start + 3]]
            right.append((tokens[place : place + len(answer)] == answer).all())
    assert np.mean(right) > 0.95


def _match(tokens: NDArray[np.int64], i: int, j: int) -> int:
    """How many tokens right before `i` are those right before `j`, which is larger."""
    differ = np.flatnonzero(tokens[i - 1 :: -1] != tokens[j - 1 : j - 1 - i : -1])
    return int(differ[0]) if len(differ) else i


@pytest.mark.parametrize("shared", [2, 3, 5])
def test_a_near_miss_is_not_all_that_question_and_statement_share(shared: int) -> None:
    stated, question = [50, *range(shared), 60], [40, 41, *range(shared)]
    misses = [tuple(near_miss(stated, question, np.random.default_rng(seed))) for seed in range(50)]
    assert {len(miss) for miss in misses} == ({1} if shared < 3 else {1, 2})
    assert all(list(miss) == question[-len(miss) :] for miss in misses)


def test_questions_stand_everywhere(tokenizer: PreTrainedTokenizerFast) -> None:
    """A model that is only ever asked at the end of its window answers there and nowhere else."""
    draw = replace(retrieval(tokenizer), copies_share=0.0).draw
    last = np.array([np.flatnonzero(draw(256, example_rng(0, 0, index))[1])[-1] for index in range(400)])
    assert (last == 255).mean() > 0.4  # the largest distances
    assert all(((last >= low) & (last < low + 64)).any() for low in (0, 64, 128, 192))


def test_the_evaluated_wording_is_never_trained_on(tokenizer: PreTrainedTokenizerFast) -> None:
    draw = retrieval(tokenizer).draw
    sentences = {s.strip().lower() for text in (TASK, FILLER, QUESTION, NEEDLE) for s in text.split(".")}
    forbidden = {s for s in sentences if len(s) > 8 and "{" not in s} | {"pass key", "passkey", "grass", "sky is"}
    for index in range(1500):
        text = tokenizer.decode(draw(512, example_rng(1, 0, index))[0]).lower()
        assert not [phrase for phrase in forbidden if phrase in text]


def test_documents_know_their_tokens() -> None:
    assert Document(num_tokens=5).boundaries == ()


def test_sentences_end_where_they_end(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "It rains. Why?\nNo, it (3.5 mm; see json.dumps) does. Yes! So"
    places = sentences_of(tokenizer).boundaries(np.array(tokenizer(text)["input_ids"]))
    parts = np.split(np.array(list(text)), places)
    assert ["".join(part) for part in parts] == [
        *("It rains.", " Why?\n", "No, it (3.5 mm; see json.dumps) does.", " Yes!", " So"),
    ]


def test_skips_fall_between_the_sentences_of_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = np.array(tokenizer("One two. Three four! Five six seven")["input_ids"][:32])
    with pytest.raises(UserError, match=r"sentences is None.*sentences_of"):
        WindowCollator(LongRecipe(), LENGTHS)
    collator = WindowCollator(LongRecipe(start="sentence"), LENGTHS, sentences=sentences_of(tokenizer))
    batch = collator([{"input_ids": ids, "visit": (0, index, 0)} for index in range(100)])
    places = (batch["position_ids"].diff() > 1).any(dim=0).nonzero()[:, 0] + 1
    assert places.tolist() == [8, 20]


def test_whole_batches_are_untouched_or_none_of_their_windows_is() -> None:
    collator = WindowCollator(PoSE(), LENGTHS, untouched_share=0.5, whole_batches=True)
    kinds = []
    for number in range(100):
        features = [{"input_ids": np.arange(32), "visit": (0, 8 * number + i, 0)} for i in range(8)]
        skipped = (collator(features)["position_ids"][:, -1] > 31).sum().item()
        kinds.append(skipped)
    assert 30 < sum(kind == 0 for kind in kinds) < 70
    assert all(kind == 0 or kind >= 6 for kind in kinds)  # a skip may be 0, but rarely is
