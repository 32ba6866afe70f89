"""Makes what `benchmarks.gpu_check` replays on a machine without FAISS: generations of a model, and its lookups.

    python -m benchmarks.gpu_recording --prompts FILES... --datastore DIR --output DIRECTORY

Runs where there is a datastore, on any machine; the files are some megabytes.
"""

import numpy as np
import torch

from benchmarks.common import load, load_prompts, parser
from benchmarks.gpu_played import LOOKUPS, RECORDING
from benchmarks.recorded_lookups import RecordedLookups
from datastore import Datastore
from datastore.lookup import CONTEXT_TOKENS
from pipeline.assemble import EngineOptions
from pipeline.drafts import load_draft
from pipeline.models import resolve_model
from pipeline.record import record
from pipeline.replay import Recording
from pipeline.request import SamplingParams

_SLOTS = 16


def main() -> None:
    """Command line."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--datastore", required=True, help="directory of a datastore of the model")
    arguments.add_argument("--draft", help="draft head; the head shipped for the model if not given")
    arguments.add_argument("--per-task", type=int, default=8)
    arguments.add_argument("--max-new-tokens", type=int, default=96)
    options = arguments.parse_args()
    if options.output is None:
        arguments.error("--output is needed: the directory for the files")
    torch.set_num_threads(options.threads)
    model, tokenizer = load(options.model, torch.bfloat16)
    prompts = load_prompts(options.prompts, tokenizer, options.per_task)
    recording = record(
        model,
        tokenizer,
        load_draft(options.draft, model, resolve_model(options.model)),
        [prompt.ids for prompt in prompts],
        SamplingParams(max_new_tokens=options.max_new_tokens),
        list(range(len(prompts))),
        EngineOptions(num_slots=_SLOTS, max_context=2048),
        {"model": options.model, "tasks": [prompt.task for prompt in prompts]},
    )
    store = Datastore.open(options.datastore)
    lookups = RecordedLookups.record(contexts_of(recording), CONTEXT_TOKENS, store.lookup)
    options.output.mkdir(parents=True, exist_ok=True)
    recording.save(options.output / RECORDING)
    lookups.save(options.output / LOOKUPS)
    tokens = sum(map(len, recording.outputs))
    print(f"{len(prompts)} generations of {tokens} tokens, {len(lookups)} lookups in {options.output}")


def contexts_of(recording: Recording) -> list[np.ndarray]:
    """What is known before each round, at every place of the outputs where one may begin."""
    return [
        np.array([*prompt, *output[:end]], np.int32)
        for prompt, output in zip(recording.prompts, recording.outputs, strict=True)
        for end in range(1, len(output))
    ]


if __name__ == "__main__":
    main()
