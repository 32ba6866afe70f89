"""Configuration of `rasd train-draft`; flags and YAML derive from it. Every field's description is its help text."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from jobs.config import Auto, Count
from jobs.fields import Options, listed, option, parse_size
from jobs.logs import LogFormat, log_format_option


class TrainConfig(Options):
    """Everything that `rasd train-draft` can be told."""

    prompts: Annotated[tuple[str, ...], BeforeValidator(listed)] = option(
        (),
        "input and output",
        "Prompts whose answers the head learns from, as for `rasd generate`; never those it will be measured on.",
        wanted="files, directories, globs or data set names",
        metavar="PATH",
    )
    answers: Annotated[tuple[str, ...], BeforeValidator(listed)] = option(
        (),
        "input and output",
        "Outputs of `rasd generate` with this model to learn from, besides or instead of answers to --prompts.",
        wanted="output directories of rasd generate",
        metavar="DIR",
    )
    corpus: Annotated[tuple[str, ...], BeforeValidator(listed)] = option(
        (),
        "input and output",
        "Documents to learn from, too, as for `rasd datastore build`: what the target says at each place of them.",
        wanted="files, directories, globs or data set names",
        metavar="PATH",
    )
    corpus_tokens: int = option(1 << 20, "input and output", "Most tokens of --corpus, from its beginning.", ge=1)
    initial: str | None = option(
        None, "input and output", "Head of this target to start from; its vocabulary and rank stay.", metavar="DIR"
    )
    text_column: str = option(
        "prompt",
        "input and output",
        "Input column that holds the prompt; of --corpus `text`.",
        metavar="NAME",
        min_length=1,
    )
    output: str = option(
        ...,
        "input and output",
        "Directory for the answers, checkpoints, curve and head. The same command again resumes.",
        wanted="a directory's path",
        metavar="DIR",
        min_length=1,
    )
    quiet: bool = option(False, "input and output", "No progress and no table; the last line is still printed.")
    log_format: LogFormat = log_format_option("input and output")

    model: str = option(..., "target", "Target model, as for `rasd generate`.", wanted="a model's name, path or hub id")
    revision: str | None = option(None, "target", "Branch, tag or commit of a hub model.")
    trust_remote_code: bool = option(False, "target", "Run Python code that comes with the model.")
    dtype: Literal["float32", "bfloat16", "float16"] = option("bfloat16", "target", "Type of the target's weights.")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "target", "Where training runs; auto takes a GPU if any.")

    max_new_tokens: int = option(256, "answers", "Most tokens of an answer.", ge=1)
    temperature: float = option(0.0, "answers", "0 is greedy.", ge=0.0, allow_inf_nan=False)
    num_samples: int = option(1, "answers", "Answers to each prompt.", ge=1)
    seed: int = option(0, "answers", "Seed of answers, batches and first weights.", ge=0, lt=1 << 63)
    slots: int = option(16, "answers", "Answers generated at once by a replica.", ge=1)
    ray_address: str | None = option(None, "answers", "Ray cluster to join; see `rasd generate`.", metavar="ADDRESS")

    draft_vocab: int = option(
        8192, "head", "Tokens that the head can propose: the most frequent of the answers.", ge=64
    )
    rank: int = option(16, "head", "Rank of the output's trained correction; 0 for none.", ge=0)

    epochs: float = option(3.0, "training", "How often each answer is seen.", gt=0.0, allow_inf_nan=False)
    batch_size: int = option(8, "training", "Sequences a step.", ge=1)
    length: int = option(512, "training", "Most tokens of a sequence; longer ones keep their end.", ge=8)
    learning_rate: float = option(1e-3, "training", "The highest; it falls to a tenth.", gt=0.0, allow_inf_nan=False)
    unroll: int = option(4, "training", "Drafted tokens trained at once.", ge=1)
    held_out: int = option(64, "training", "Answers to evaluate on, which are not learned from.", ge=1)
    evaluate_every: int = option(100, "training", "Steps between evaluations, each with a checkpoint.", ge=1)
    cache: Annotated[int, Field(ge=0), BeforeValidator(parse_size)] = option(
        16 << 30,
        "training",
        "Disk for what the target says of each sequence, so that later epochs need not ask it; 0 for none.",
        wanted="a size such as 16GiB, or 0",
        metavar="SIZE",
    )
    num_threads: Annotated[Count | Auto, Field()] = option("auto", "training", "CPU threads; auto is torch's choice.")
    num_workers: int = option(
        1, "training", "Workers that share every batch, through Ray Train: a GPU each, or cores without GPUs.", ge=1
    )
