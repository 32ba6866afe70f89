"""A small throughput run of the real model, shared by the tests that look at what comes of it."""

import json
from pathlib import Path

METHODS = ("plain", "context", "draft", "rasd", "hf-generate", "hf-prompt-lookup")
SLOTS, REPEATS, TOKENS = (1, 2), 2, 12
QUESTIONS = [
    {
        "question_id": 1,
        "category": "writing",
        "turns": ["Say red, blue, red, blue, red, blue.", "Say </script> & <b> twice."],
    },
    {"question_id": 2, "category": "writing", "turns": ["Count from one to nine, then again."]},
    {"question_id": 3, "category": "listing", "turns": ["List the months. List the months again."]},
]
NUM_REQUESTS = 4  # the turns of all questions


def write_questions(path: Path) -> Path:
    """Spec-Bench's format."""
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return path


def words(questions: Path, output: Path, cluster: str, *more: str) -> list[str]:
    """The command line."""
    options = ["--model", "smollm2-135m", "--prompts", str(questions), "--output", str(output), "--dtype", "float32"]
    options += ["--methods", ",".join(METHODS), "--slots", ",".join(map(str, SLOTS)), "--repeats", str(REPEATS)]
    options += ["--max-new-tokens", str(TOKENS), "--per-task", "2", "--traced", "2", "--num-threads", "1", "--quiet"]
    return ["throughput", *options, "--ray-address", cluster, *more]
