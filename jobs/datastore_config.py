"""Configuration of the `rasd datastore` commands that write: flags and YAML derive from these fields.

Knows nothing of argparse or files (see jobs/options.py). Every field's description is its help text.
"""

from typing import Annotated

from pydantic import BeforeValidator, Field, field_validator
from pydantic_core.core_schema import ValidationInfo

from jobs.config import Auto, Count
from jobs.fields import OnOff, Options, listed, option, parse_size
from jobs.logs import LogFormat, log_format_option

# Bytes of UTF-8, of which a token has at least one, stay below the 2^32 tokens that a segment can number.
MAX_SEGMENT_TOKENS = 1 << 29


class SegmentsConfig(Options):
    """What building and merging share."""

    output: str = option(
        ...,
        "output",
        "Directory of the datastore. The same command again resumes.",
        wanted="a directory's path",
        metavar="DIR",
        min_length=1,
    )
    segment_tokens: Annotated[Annotated[int, Field(ge=1, le=MAX_SEGMENT_TOKENS)], BeforeValidator(parse_size)] = option(
        64_000_000,
        "output",
        "About how many tokens a segment holds; memory follows it.",
        wanted=f"a number such as 64M, at most {MAX_SEGMENT_TOKENS}",
        metavar="N",
    )
    quiet: bool = option(False, "output", "No progress bar and no table; the last line is still printed.")
    log_format: LogFormat = log_format_option("output")
    num_threads: Count | Auto = option(
        "auto", "cluster", "CPU threads of a task, which makes one segment; auto is a node's cores, at most 8."
    )
    ray_address: str | None = option(
        None,
        "cluster",
        "Ray cluster to join; `local` starts one. Default: RAY_ADDRESS, else the cluster this runs on, else local.",
        metavar="ADDRESS",
    )


class CorpusConfig(SegmentsConfig):
    """What building and appending share."""

    corpus: Annotated[tuple[str, ...], BeforeValidator(listed)] = option(
        ...,
        "corpus",
        "Rows (.jsonl, .json, .csv, .parquet), texts and source files (.txt, .md, .py, ...), directories, globs,"
        " Hugging Face data sets, or generations:DIR, the outputs of a generation job.",
        wanted="at least one file, directory, glob, data set name or generations:DIR",
        metavar="PATH",
        min_length=1,
    )
    text_column: str = option(
        "text", "corpus", "Column that holds a document in files of rows.", metavar="NAME", min_length=1
    )
    chat: bool = option(False, "corpus", "Rows hold conversations in `messages`; the model's chat template is applied.")

    model: str = option(
        ...,
        "model",
        "Model whose tokenizer to use: smollm2-135m (embedded), a local directory or .gguf file, or a hub id.",
        wanted="a model's name, path or hub id",
        min_length=1,
    )
    revision: str | None = option(None, "model", "Branch, tag or commit of a hub model.")
    trust_remote_code: bool = option(False, "model", "Run Python code that comes with the model.")


class BuildConfig(CorpusConfig):
    """Everything that `rasd datastore build` can be told."""

    dense: OnOff = option("on", "passages", "Cut and embed passages for the search by meaning; off is much faster.")
    embedder: str = option(
        "all-minilm-l6-v2",
        "passages",
        "Encoder: all-minilm-l6-v2 (embedded), a local directory or a hub id.",
        min_length=1,
    )
    passage_tokens: int = option(128, "passages", "Tokens of a passage.", ge=1)
    overlap: int = option(
        32,
        "passages",
        "Tokens that neighbouring passages share.",
        wanted="a whole number of at least 0 and below --passage-tokens",
        ge=0,
    )

    @field_validator("overlap")
    @classmethod
    def _check_overlap(cls, overlap: int, info: ValidationInfo) -> int:
        if overlap >= info.data.get("passage_tokens", overlap + 1):
            raise ValueError("too large")
        return overlap


class AppendConfig(CorpusConfig):
    """Everything that `rasd datastore append` can be told."""

    embedder: str | None = option(
        None, "passages", "The datastore's encoder under another name, e.g. where its files were moved.", min_length=1
    )


class MergeConfig(SegmentsConfig):
    """Everything that `rasd datastore merge` can be told, besides the datastores to merge."""
