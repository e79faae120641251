"""Log-probabilities of the tokens of a text by vLLM. Runs in vLLM's own environment, without Skipwise.

    VLLM_PYTHON experiments/vllm_logprobs.py MODEL IDS.json OUTPUT.json

IDS.json is a list of token ids; OUTPUT.json gets a list of log-probabilities, the first of them null.
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams


def main() -> None:
    """Read, ask, write."""
    model, source, output = sys.argv[1:]
    ids = json.loads(Path(source).read_text())
    llm = LLM(
        model=model, dtype="float32", max_model_len=len(ids) + 16, max_num_batched_tokens=2048, enforce_eager=True
    )
    (result,) = llm.generate(
        [{"prompt_token_ids": ids}], SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    )
    found = [
        None if one is None else one[token].logprob for one, token in zip(result.prompt_logprobs, ids, strict=True)
    ]
    Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
