"""Is the output the target's own? Every prompt against transformers' `generate`, with all methods and slot counts.

    python -m benchmarks.exactness --prompts FILES... --per-task 7 --dtype float32 --output
    benchmarks/results/exactness.json

In fp32 a difference counts unless it starts where the two best scores differ by less than 3e-4
(`benchmarks.reference`). In bf16 rounding alone moves logits by up to 1, so the rate of differing prompts is only
stated. Sampled outputs are held against our own plain decoding at one slot, which is what speculation, slots and
order must not change.
"""

import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.common import Prompt, engine_for, load, load_prompts, parser, report, shuffled
from benchmarks.reference import first_mismatch, generate
from pipeline.noise import row_seed
from pipeline.request import Request, SamplingParams


def main() -> None:
    """Command line."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--per-task", type=int, default=7)
    arguments.add_argument("--max-new-tokens", type=int, default=32)
    arguments.add_argument("--slots", type=int, nargs="+", default=[1, 4, 16])
    arguments.add_argument("--sampled-slots", type=int, nargs="*", default=[1, 16])
    arguments.add_argument("--methods", nargs="+", default=["plain", "context"])
    arguments.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    model, tokenizer = load(options.model, dtype)
    prompts = load_prompts(options.prompts, tokenizer, options.per_task)
    greedy = SamplingParams(max_new_tokens=options.max_new_tokens)
    sampled = SamplingParams(max_new_tokens=options.max_new_tokens, temperature=0.8, top_p=0.9)
    expected = [generate(model, prompt.ids, options.max_new_tokens) for prompt in prompts]
    expected_sampled = _run(options, dtype, "plain", 1, prompts, sampled) if options.sampled_slots else []
    rows = []
    for method in options.methods:
        for slots in options.slots:
            for kind, params, want in (("greedy", greedy, expected), ("sampled", sampled, expected_sampled)):
                if kind == "sampled" and (slots not in options.sampled_slots or (method, slots) == ("plain", 1)):
                    continue  # plain decoding at one slot is the reference
                begin = time.perf_counter()
                got = _run(options, dtype, method, slots, prompts, params)
                row = {"method": method, "slots": slots, "kind": kind, **_compare(model, prompts, want, got, params)}
                rows.append(row)
                print(f"{row} {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    report(
        {
            "dtype": options.dtype,
            "prompts": len(prompts),
            "tasks": sorted({prompt.task for prompt in prompts}),
            "max_new_tokens": options.max_new_tokens,
            "runs": rows,
        },
        options.output,
    )
    if dtype == torch.float32 and any(row["counted"] for row in rows):
        sys.exit("An fp32 output differs from the reference beyond rounding.")


def _run(
    options: Any, dtype: torch.dtype, method: str, slots: int, prompts: Sequence[Prompt], params: SamplingParams
) -> list[list[int]]:
    """Outputs in the prompts' order; with several slots the prompts arrive shuffled."""
    engine = engine_for(options.model, dtype, method, slots)
    order = shuffled(prompts, seed=slots) if slots > 1 else range(len(prompts))
    requests = [Request(i, prompts[i].ids, params, row_seed(0, i, 0)) for i in order]
    outputs = {generation.request_id: list(generation.token_ids) for generation in engine.generate(requests)}
    return [outputs[i] for i in range(len(prompts))]


def _compare(
    model: Any,
    prompts: Sequence[Prompt],
    want: Sequence[list[int]],
    got: Sequence[list[int]],
    params: SamplingParams,
) -> dict[str, Any]:
    listed = []
    for i, (prompt, a, b) in enumerate(zip(prompts, want, got, strict=True)):
        mismatch = first_mismatch(model, prompt.ids, a, b, params, row_seed(0, i, 0))
        if mismatch is not None:
            listed.append(
                {"id": prompt.id, "place": mismatch.place, "margin": mismatch.margin, "counts": mismatch.counts}
            )
    return {"different": len(listed), "counted": sum(entry["counts"] for entry in listed), "mismatches": listed}


if __name__ == "__main__":
    main()
