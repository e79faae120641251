"""Reading in pieces must be reading: against plain forward passes and `generate`."""

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PreTrainedModel,
    RwkvConfig,
    RwkvForCausalLM,
)  # fmt: skip

from skipwise.errors import UserError
from skipwise.evaluation import inference as reading
from skipwise.evaluation.inference import continue_greedily, pinned_rope, reporting, score_endings, score_tokens
from skipwise.models import attention
from skipwise.models.attention import prefer_blocks
from tests.picomodels import PICO_MODELS, VOCABULARY, pico_llama

IDS = torch.randint(2, VOCABULARY, (2, 61), generator=torch.Generator().manual_seed(0))


def windowed() -> PreTrainedModel:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=48, sliding_window=16, initializer_range=0.2,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def some_windowed() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, intermediate_size=48, sliding_window=16, initializer_range=0.2,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


def latent() -> PreTrainedModel:
    """Its values are narrower than its keys."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=48, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
        first_k_dense_replace=2, initializer_range=0.2,
    )  # fmt: skip
    return DeepseekV3ForCausalLM(config).eval()


def learned_positions() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval()


def recurrent() -> PreTrainedModel:
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8, initializer_range=0.2
    )
    return MambaForCausalLM(config).eval()


def other_state() -> PreTrainedModel:
    torch.manual_seed(0)
    config = RwkvConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32)
    return RwkvForCausalLM(config).eval()


def no_cache() -> PreTrainedModel:
    torch.manual_seed(0)
    config = OpenAIGPTConfig(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2
    )
    return OpenAIGPTLMHeadModel(config).eval()


# These take no cache, or another one.
IN_ONE_PIECE: dict[str, Callable[[], Any]] = {
    "recurrent": recurrent, "other state": other_state, "no cache": no_cache,
}  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    **PICO_MODELS, "windowed": windowed, "some windowed": some_windowed, "latent": latent,
    "learned positions": learned_positions, **IN_ONE_PIECE,
}  # fmt: skip


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "CHUNK", 10)


@torch.no_grad()
def reference(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """float64[batch, n - 1]: log-likelihoods from one ordinary forward pass."""
    logits = model(ids, attention_mask=torch.ones_like(ids)).logits[:, :-1].double()
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.usefixtures("small_chunks")
def test_in_pieces_is_as_in_one(kind: str, blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with the attention that takes the place of `sdpa` on a CPU."""
    model = MODELS[kind]()
    if blocks:
        monkeypatch.setattr(attention, "DTYPES", {torch.float32})
        monkeypatch.setattr(attention, "BLOCK_ROWS", 4)
        prefer_blocks(model)
    scored = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    scored[:, 0] = False
    widths: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: widths.append(output.shape[1]))
    scores = score_tokens(model, IDS, scored)
    assert max(widths[-7:]) == (61 if kind in IN_ONE_PIECE else 10)  # after the question whether it can be
    if blocks and kind in PICO_MODELS:
        assert model.config._attn_implementation == attention.NAME
    if model.config._attn_implementation == attention.NAME:
        model.set_attn_implementation("sdpa")
    assert scores.log_probs.double().numpy() == pytest.approx(reference(model, IDS)[scored[:, 1:]].numpy(), abs=1e-4)


@pytest.mark.usefixtures("small_chunks")
def test_never_more_logits_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen to fail when chunks were cut by their tokens only."""
    model = pico_llama()
    monkeypatch.setattr(reading, "MOST_LOGITS", 5 * VOCABULARY)
    sizes: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.numel()))
    scored = torch.ones_like(IDS[:1], dtype=torch.bool)
    scored[:, 0] = False
    scores = score_tokens(model, IDS[:1], scored)
    assert max(sizes) <= 5 * VOCABULARY
    assert scores.log_probs.double().numpy() == pytest.approx(reference(model, IDS[:1])[0].numpy(), abs=1e-4)
    sizes.clear()
    score_tokens(model, IDS[:1], torch.arange(61)[None] == 60)
    assert sum(sizes) <= 7 * VOCABULARY  # one per chunk, and no more where nothing is scored


def test_ids_without_an_embedding_are_refused() -> None:
    """A prompt may hold tokens that no document has; on an accelerator they would end the process."""
    model = pico_llama()
    beyond = [5, model.config.vocab_size]
    for read in (
        lambda: score_tokens(model, torch.tensor([beyond]), torch.tensor([[False, True]])),
        lambda: list(score_endings(model, [(beyond, 1)], [True])),
        lambda: continue_greedily(model, beyond, 1),
    ):
        with pytest.raises(UserError) as caught:
            read()
        assert caught.value.code == "vocabulary_mismatch"


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.usefixtures("small_chunks")
def test_endings_of_texts_that_begin_alike(kind: str) -> None:
    model = MODELS[kind]()
    texts = [([*IDS[0, :n].tolist(), *IDS[1, n : 50 + n // 10].tolist()], 4) for n in (3, 10, 30, 44, 44, 49)]
    for index, scores in score_endings(model, texts, [True] * len(texts)):
        ids = torch.tensor([texts[index][0]])
        assert scores.log_probs.double().numpy() == pytest.approx(reference(model, ids)[0, -4:].numpy(), abs=1e-4)


@pytest.mark.usefixtures("small_chunks")
def test_beginnings_are_read_once() -> None:
    model = pico_llama()
    list(score_endings(model, [([2, 3, 4], 1)], [True]))  # asks the model, once, whether it can be read in pieces
    read: list[int] = []
    model.model.register_forward_pre_hook(
        lambda module, args, keywords: read.append(keywords["input_ids"].shape[1]), with_kwargs=True
    )
    texts = [([*IDS[0, :50].tolist(), *IDS[1, 50 + i : 55 + i].tolist()], 2) for i in range(4)]
    list(score_endings(model, texts, [True] * 4))
    assert sum(read) == 55 + 3 * 5
    read.clear()
    list(score_endings(model, texts, [False] * 4))
    assert not read
    list(score_endings(model, texts, [True, False, False, False]))
    assert sum(read) == 55


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.usefixtures("small_chunks")
def test_greedy_writing_is_that_of_generate(kind: str) -> None:
    model = MODELS[kind]()
    for row in IDS:
        prompt = row[:45].tolist()
        expected = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, 45, dtype=torch.int64),
            max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=1,
        )[0, 45:].tolist()  # fmt: skip
        model.generation_config.eos_token_id = None
        assert continue_greedily(model, prompt, 12) == expected
        assert continue_greedily(model, prompt, 12, lambda written: len(written) == 3) == expected[:3]
        model.generation_config.eos_token_id = [expected[5]]
        assert continue_greedily(model, prompt, 12) == expected[: expected.index(expected[5])]


ROPES: dict[str, dict[str, object]] = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "longrope": {
        "rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 8, "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 9.0],
    },
}  # fmt: skip


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.usefixtures("small_chunks")
def test_frequencies_are_those_of_the_whole_length(rope: str) -> None:
    """Trap 11: while a long input is fed in pieces. Seen to fail without `pinned_rope`."""
    model = pico_llama(rope_parameters={"rope_theta": 1e4, **ROPES[rope]}, max_position_embeddings=32)
    scored = torch.ones_like(IDS, dtype=torch.bool)
    scored[:, 0] = False
    expected = reference(model, IDS).flatten().numpy()
    for _ in range(2):  # and afterwards the model is as it was
        assert score_tokens(model, IDS, scored).log_probs.double().numpy() == pytest.approx(expected, abs=1e-4)
        short = reference(model, IDS[:, :20])
        with pinned_rope(model, 61):
            assert not torch.allclose(reference(model, IDS[:, :20]), short, atol=1e-3)
        assert torch.allclose(reference(model, IDS[:, :20]), short, atol=1e-6)
    # A text longer than the window, after a longer one: as if it had been the first.
    fresh = pico_llama(rope_parameters={"rope_theta": 1e4, **ROPES[rope]}, max_position_embeddings=32)
    after = score_tokens(model, IDS[:, :40], scored[:, :40]).log_probs
    assert torch.allclose(after.double(), reference(fresh, IDS[:, :40]).flatten(), atol=1e-4)


@pytest.mark.usefixtures("small_chunks")
def test_what_is_left_out_changes_no_piece() -> None:
    """Resuming must round as going through did. Seen to fail when pieces did not end where the next text leaves."""
    model = pico_llama()
    pieces: Counter[tuple[int, int]] = Counter()

    def note(module: Any, args: Any, keywords: Any) -> None:
        end = keywords["attention_mask"].shape[1]
        pieces[end - keywords["input_ids"].shape[1], end] += 1

    model.model.register_forward_pre_hook(note, with_kwargs=True)
    texts = [([*IDS[0, :n].tolist(), *IDS[1, n:60].tolist()], 2) for n in (23, 31, 42, 50)]
    everything = dict(score_endings(model, texts, [True] * 4))
    expected = pieces.copy()
    for left_out in range(4):
        pieces.clear()
        wanted = [index != left_out for index in range(4)]
        for index, scores in score_endings(model, texts, wanted):
            assert torch.equal(scores.log_probs, everything[index].log_probs)
        assert pieces < expected


def test_the_cache_is_given_by_the_name_that_a_class_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.24 calls it `cache`; this version may have the older name."""
    own = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"

    class Newer(LlamaForCausalLM):
        def forward(self, input_ids: Any, cache: Any = None, **rest: Any) -> Any:
            return super().forward(input_ids, **{own: cache}, **rest)

    monkeypatch.setattr(reading, "CHUNK", 16)
    model = pico_llama().eval()
    newer = Newer(model.config).eval()
    newer.load_state_dict(model.state_dict())
    scored = torch.ones_like(IDS, dtype=torch.bool)
    scored[:, 0] = False
    one, other = (score_tokens(each, IDS, scored).log_probs for each in (model, newer))
    torch.testing.assert_close(one, other)


def test_every_chunk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "CHUNK", 20)
    heard: list[tuple[int, int]] = []
    model, scored = pico_llama(), torch.ones_like(IDS, dtype=torch.bool)
    scored[:, 0] = False
    with reporting(lambda read, tokens: heard.append((read, tokens))):
        score_tokens(model, IDS, scored)
    assert heard == [(20, 61), (40, 61), (60, 61), (61, 61)]
    score_tokens(model, IDS, scored)
    assert len(heard) == 4
