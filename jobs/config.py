"""Configuration of `rasd generate`: one typed, validated object; flags and YAML derive from its fields.

Knows nothing of argparse or files (see jobs/options.py). Every field's description is its help text.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from jobs.fields import OnOff, Options, listed, option, parse_size
from jobs.logs import LogFormat, log_format_option
from pipeline.request import SamplingParams

Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1)]


class GenerateConfig(Options):
    """Everything that `rasd generate` can be told."""

    prompts: Annotated[tuple[str, ...], BeforeValidator(listed)] = option(
        ...,
        "input and output",
        "Files (.jsonl, .json, .parquet, .csv, .txt), directories, globs or Hugging Face data sets.",
        wanted="at least one file, directory, glob or data set name",
        metavar="PATH",
        min_length=1,
    )
    output: str = option(
        ...,
        "input and output",
        "Directory for the part files, commits and report, or a URI (s3://, gs://, az://). The same command again"
        " resumes.",
        wanted="a directory's path or a URI",
        metavar="DIR",
        min_length=1,
    )
    text_column: str = option(
        "prompt", "input and output", "Input column that holds the prompt.", metavar="NAME", min_length=1
    )
    rows_per_shard: Count | Auto = option(
        "auto",
        "input and output",
        "Input rows in a shard, the unit of commit; auto makes about 64 shards of 8 to 256 rows.",
    )
    max_error_rate: float = option(
        1.0,
        "input and output",
        "Stop with exit code 3 once more than this share of all output rows are error rows.",
        ge=0.0,
        le=1.0,
    )
    retry_errors: bool = option(
        False, "input and output", "Try rows again that failed in an earlier run; those that are fine stay as they are."
    )
    dry_run: bool = option(False, "input and output", "Print the plan and a memory estimate, then stop.")
    trace: str | None = option(
        None,
        "input and output",
        "File for the times of the replicas' rounds by phase, for Perfetto or chrome://tracing.",
        metavar="FILE",
        min_length=1,
    )
    quiet: bool = option(False, "input and output", "No progress bar and no table; the last line is still printed.")
    log_format: LogFormat = log_format_option("input and output")

    model: str = option(
        ...,
        "model",
        "Target model: smollm2-135m (embedded), a local directory or .gguf file, or a hub id.",
        wanted="a model's name, path or hub id",
        min_length=1,
    )
    revision: str | None = option(None, "model", "Branch, tag or commit of a hub model.")
    trust_remote_code: bool = option(False, "model", "Run Python code that comes with the model.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "model", "Type of weights and KV cache; auto is bfloat16 on GPUs, float32 on CPUs."
    )
    quantization: Literal["none", "int8"] = option(
        "none",
        "model",
        "int8 keeps the weights of linear layers in 8 bits, which the target is then defined by; needs torchao.",
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "model", "Where the model runs; auto takes a GPU if any.")

    max_new_tokens: int = option(256, "sampling", "Most tokens of an output, end of sequence included.", ge=1)
    temperature: float = option(
        0.0, "sampling", "0 is greedy; otherwise logits are divided by it.", ge=0.0, allow_inf_nan=False
    )
    top_k: int = option(0, "sampling", "Sample among the k most likely tokens; 0 is off.", ge=0)
    top_p: float = option(1.0, "sampling", "Sample among the likeliest tokens of this mass; 1 is off.", gt=0.0, le=1.0)
    min_p: float = option(
        0.0, "sampling", "Sample among tokens this fraction as likely as the likeliest; 0 is off.", ge=0.0, le=1.0
    )
    repetition_penalty: float = option(
        1.0, "sampling", "Above 1 discourages tokens already seen; 1 is off.", gt=0.0, allow_inf_nan=False
    )
    stop: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(listed)] = option(
        (), "sampling", "A string that ends the output, itself cut off; repeatable.", wanted="a non-empty string"
    )
    stop_token_ids: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(listed)] = option(
        (),
        "sampling",
        "Token ids that end the output, besides the model's own.",
        wanted="whole numbers of 0 or more",
        metavar="ID",
    )
    ignore_eos: bool = option(False, "sampling", "Go on after end-of-sequence tokens.")
    num_samples: int = option(1, "sampling", "Samples, that is output rows, of each prompt.", ge=1)
    logprobs: bool = option(False, "sampling", "Add a column with the chosen tokens' log-probabilities.")
    seed: int = option(
        0, "sampling", "Seed of the job; each row's seed derives from it.", ge=-(1 << 63), le=(1 << 63) - 1
    )

    method: str = option("auto", "speed", "How to speculate; auto is rasd, with all sources there are.", min_length=1)
    budget: Annotated[int, Field(ge=0)] | Auto = option(
        "auto", "speed", "Nodes verified a round and slot, besides the root."
    )
    slots: Count | Auto = option(
        "auto", "speed", "Sequences decoded at once by a replica; auto is 16 on CPUs, and on GPUs what KV memory holds."
    )
    prefill_chunk: int = option(512, "speed", "Most prompt tokens that join one round.", ge=1)
    max_context: Annotated[int, Field(ge=2)] | Auto = option(
        "auto", "speed", "Most tokens of a row, prompt and output; auto is what the model allows."
    )
    kv_memory: Annotated[Count | Auto, BeforeValidator(parse_size)] = option(
        "auto",
        "speed",
        "Memory of a replica's KV cache.",
        wanted="auto or a size such as 4GiB",
        metavar="auto|SIZE",
    )

    draft: str | None = option(
        None,
        "speed",
        "Draft head trained for the target, or any model with its tokenizer: a directory, .gguf file, name or hub id;"
        " `head`, the default where there is one, is the head that comes with rasd for the target.",
        metavar="head|MODEL",
        min_length=1,
    )
    datastore: str | None = option(
        None, "retrieval", "Datastore built with `rasd datastore build` for this model.", metavar="DIR"
    )
    live: OnOff = option("on", "retrieval", "Search the job's own finished outputs, too.", metavar="on|off")
    retrieval: Literal["auto", "shared", "per-node", "in-process"] = option(
        "auto",
        "retrieval",
        "Who searches: auto is each replica where its node sees the datastore, one service for the rest.",
    )
    passages: int = option(4, "retrieval", "Passages of the datastore looked up for each prompt.", ge=0)
    live_tokens: int = option(1 << 22, "retrieval", "Tokens of finished outputs kept for the search.", ge=1)
    retrieval_deadline: float = option(
        20.0,
        "retrieval",
        "Milliseconds that a round waits for a retrieval service at most.",
        gt=0.0,
        le=60_000.0,
        allow_inf_nan=False,
    )

    num_replicas: Count | Auto = option(
        "auto", "cluster", "Replicas of the model; auto is one a GPU, or one a node without GPUs."
    )
    gpus_per_replica: Annotated[float, Field(ge=0.0)] | Auto = option(
        "auto",
        "cluster",
        "GPUs a replica reserves; auto is one for each process where there are GPUs, else 0.",
    )
    tensor_parallel: Count = option(
        1,
        "cluster",
        "Processes that share a replica's target, each with a part of every layer and, where there are GPUs, one GPU.",
    )
    num_threads: Count | Auto = option(
        "auto", "cluster", "CPU threads of a replica's process; auto divides a node's cores among its replicas."
    )
    ray_address: str | None = option(
        None,
        "cluster",
        "Ray cluster to join; `local` starts one. Default: RAY_ADDRESS, else the cluster this runs on, else local.",
        metavar="ADDRESS",
    )

    def sampling(self) -> SamplingParams:
        """The part that the engine sees."""
        return SamplingParams(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            logprobs=self.logprobs,
        )
