"""vLLM's side of long_decode.py, by vLLM's Python: -m benchmarks.long_decode_vllm FOLDER CONTEXT ROWS own|shared.

Prints JSON: milliseconds, the median of the intervals between steps in which every row draws one token.
"""

import json
import os
import random
import statistics
import sys
import time

TOKENS = 33
WORDS = 2048


def main(folder: str, context: int, rows: int, kind: str) -> None:
    """Measure one kind: own or shared prompts."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams

    how = {"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True, "max_num_seqs": rows}
    engine = LLM(folder, max_model_len=context + TOKENS, enable_prefix_caching=kind == "shared", **how).llm_engine
    drawn = random.Random(0)
    prompts = [[drawn.randrange(1, WORDS) for _ in range(context)] for _ in range(rows)]
    params = SamplingParams(temperature=1.0, max_tokens=TOKENS, min_tokens=TOKENS, ignore_eos=True, detokenize=False)
    for row in range(rows):
        engine.add_request(str(row), {"prompt_token_ids": prompts[0 if kind == "shared" else row]}, params)
        if kind == "shared" and row == 0:
            engine.step()  # the others find the prompt's blocks
    times, lengths = [], []
    while engine.has_unfinished_requests():
        found = engine.step()
        times.append(time.perf_counter())
        lengths.append(sum(len(one.outputs[0].token_ids) for one in found) if len(found) == rows else 0)
    pairs = zip(times, times[1:], lengths, lengths[1:], strict=False)
    steps = [after - before for before, after, old, new in pairs if old and new == old + rows]
    print(json.dumps({"ms": statistics.median(steps) * 1e3, "floor_ms": float("nan"), "steps": len(steps)}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
