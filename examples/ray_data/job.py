"""A Ray Data dataset as the input of a generation job, and the job's rows as a dataset again.

python examples/ray_data/job.py smollm2-135m WORK    # the same command again resumes

WORK/prompts is written once, in the dataset's order; from there on it is a job like any other.
"""

import subprocess
import sys
from pathlib import Path

import ray.data

from jobs.dataset_inputs import read_outputs, write_inputs


def main(model: str, work: Path, *options: str) -> int:
    """Returns the job's exit code."""
    tickets = ray.data.from_items([{"id": f"t{i}", "text": f"order number {i} is late"} for i in range(12)])
    dataset = tickets.map(lambda row: {"id": row["id"], "prompt": f"A customer says: {row['text']}. We answer:"})
    write_inputs(dataset, work / "prompts", sort_by="id")

    words = ["--model", model, "--prompts", str(work / "prompts"), "--output", str(work / "out")]
    command = [sys.executable, "-m", "jobs.generate", *words, "--max-new-tokens", "16", *options]
    code = subprocess.run(command, check=False).returncode  # a driver of its own, on the same cluster
    if code == 0:
        answers = read_outputs(work / "out")
        print(f"{answers.count()} answers; the first: {answers.take(1)[0]['text']!r}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]))
