"""The engine inside a Ray Data pipeline: each batch comes back with the columns of `rasd generate`.

python examples/ray_data/batches.py smollm2-135m answers    # writes Parquet files into answers/

With GPUs, give map_batches `num_gpus=1` and as many actors as there are GPUs.
"""

import sys

import ray.data

from jobs.batch_generator import BatchGenerator


def main(model: str, output: str) -> None:
    """Reads, generates, writes."""
    subjects = ["the sea", "bread", "a clock", "winter", "copper", "a long road"]
    dataset = ray.data.from_items([{"subject": s, "prompt": f"Write about {s}. It is"} for s in subjects])
    answers = dataset.map_batches(
        BatchGenerator,
        fn_constructor_kwargs={"model": model, "max_new_tokens": 16, "slots": 4, "budget": 8, "max_context": 256},
        batch_format="pyarrow",
        batch_size=4,
        num_cpus=1,
        concurrency=1,
    )
    answers.write_parquet(output)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
