"""Configuration of `rasd throughput`; flags and YAML derive from it. Every field's description is its help text."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from jobs.config import Auto, Count, GenerateConfig
from jobs.fields import OnOff, Options, listed, option
from jobs.logs import LogFormat, log_format_option
from pipeline.errors import ConfigError

OURS = ("plain", "context", "corpus", "draft", "switch", "rasd-fixed", "rasd")

# What `--quick`, neither, and `--full` stand for, where the option itself is not given.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "quick": {
        "methods": ("plain", "context", "draft", "rasd-fixed", "rasd"),
        "slots": (1, 8),
        "per_task": 1,
        "max_new_tokens": 24,
        "repeats": 2,
    },
    "default": {"methods": OURS, "slots": (1, 16), "per_task": 3, "max_new_tokens": 48, "repeats": 3},
    "full": {
        "methods": (*OURS, "hf-generate", "hf-prompt-lookup", "hf-assisted"),
        "slots": (1, 4, 16, 64),
        "per_task": 12,
        "max_new_tokens": 128,
        "repeats": 5,
    },
}


def separated(value: object) -> object:
    """Several values in one word, `1,4,16`, become several."""
    words = listed(value)
    if not isinstance(words, list | tuple):
        return words
    return [part for word in words for part in (word.split(",") if isinstance(word, str) else [word]) if part != ""]


class ThroughputConfig(Options):
    """Everything that `rasd throughput` can be told."""

    prompts: Annotated[tuple[str, ...], BeforeValidator(listed)] = option(
        ...,
        "input and output",
        "Questions: Spec-Bench's and MT-bench's question files, HumanEval's, or rows as for `rasd generate` with a"
        " column `task`.",
        wanted="at least one file, directory, glob or data set name",
        metavar="PATH",
        min_length=1,
    )
    output: str = option(
        ...,
        "input and output",
        "Directory for results.parquet, results.json, report.html and plots. The same command again resumes.",
        wanted="a directory's path",
        metavar="DIR",
        min_length=1,
    )
    quiet: bool = option(False, "input and output", "No progress and no table; the last line is still printed.")
    log_format: LogFormat = log_format_option("input and output")

    model: str = option(..., "models", "Target model, as for `rasd generate`.", wanted="a model's name, path or hub id")
    revision: str | None = option(None, "models", "Branch, tag or commit of a hub model.")
    trust_remote_code: bool = option(False, "models", "Run Python code that comes with the model.")
    draft: str | None = option(None, "models", "Draft head or model, as for `rasd generate`.", metavar="head|MODEL")
    datastore: str | None = option(None, "models", "Datastore, as for `rasd generate`.", metavar="DIR")
    live: OnOff = option("on", "models", "Search each method's own finished outputs, too.", metavar="on|off")
    passages: int = option(4, "models", "Passages of the datastore looked up for each prompt; 0 for none.", ge=0)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "bfloat16", "models", "Type of weights and KV cache."
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "models", "Where the model runs; auto takes a GPU if any.")

    quick: bool = option(False, "measurement", "A small matrix: a look within minutes.")
    full: bool = option(False, "measurement", "The whole matrix: all methods and peers, 1 to 64 slots.")
    methods: Annotated[tuple[str, ...] | Auto, BeforeValidator(lambda v: v if v == "auto" else separated(v))] = option(
        "auto",
        "measurement",
        "Methods of `rasd generate`, each perhaps with its fixed budget (`draft:12`), and the peers hf-generate,"
        " hf-prompt-lookup, hf-assisted; auto is those there is a draft and a datastore for.",
        wanted="methods, separated by commas",
        metavar="METHOD,...",
    )
    slots: Annotated[tuple[Count, ...] | Auto, BeforeValidator(lambda v: v if v == "auto" else separated(v))] = option(
        "auto",
        "measurement",
        "Sequences decoded at once by a replica, measured one after the other; auto is 1,16.",
        wanted="whole numbers of at least 1, separated by commas",
        metavar="N,...",
    )
    per_task: Count | Auto = option("auto", "measurement", "Questions of each task; auto is 3.")
    skip: Annotated[int, Field(ge=0)] = option(0, "measurement", "Questions of each task passed over first.")
    tasks: Annotated[tuple[str, ...], BeforeValidator(separated)] = option(
        (), "measurement", "Only these tasks.", wanted="names of tasks, separated by commas", metavar="TASK,..."
    )
    max_new_tokens: Count | Auto = option("auto", "measurement", "Most tokens of an output; auto is 48.")
    temperature: float = option(0.0, "measurement", "0 is greedy.", ge=0.0, allow_inf_nan=False)
    repeats: Count | Auto = option(
        "auto", "measurement", "How often everything is measured, with new engines; auto is 3."
    )
    seed: int = option(0, "measurement", "Seed of the samples.", ge=-(1 << 63), le=(1 << 63) - 1)
    traced: Annotated[int, Field(ge=0)] = option(
        12, "measurement", "Questions whose answers the report shows token by token, spread over the tasks."
    )

    replicas: Count | Auto = option("auto", "cluster", "Replicas that share every sample; auto is one a GPU or node.")
    gpus_per_replica: Annotated[float, Field(ge=0.0)] | Auto = option(
        "auto", "cluster", "GPUs a replica reserves; auto is 1 where the cluster has GPUs, else 0."
    )
    num_threads: Count | Auto = option(
        "auto", "cluster", "CPU threads of a replica; auto divides a node's cores among its replicas."
    )
    ray_address: str | None = option(None, "cluster", "Ray cluster to join; see `rasd generate`.", metavar="ADDRESS")

    def resolved(self) -> "ThroughputConfig":
        """With what the preset says for all that is `auto`.

        Raises:
            ConfigError: two presets are asked for.
        """
        if self.quick and self.full:
            raise ConfigError("--quick and --full are both given; choose one.")
        preset = PRESETS["quick" if self.quick else "full" if self.full else "default"]
        return self.model_copy(update={name: value for name, value in preset.items() if getattr(self, name) == "auto"})

    def as_generation(self) -> GenerateConfig:
        """What models, sources and the cluster are asked for, in the words of `rasd generate`."""
        shared = ("prompts", "output", "model", "revision", "trust_remote_code", "draft", "datastore", "live")
        more = ("passages", "dtype", "device", "gpus_per_replica", "num_threads", "ray_address", "seed")
        values = {name: getattr(self, name) for name in (*shared, *more)}
        return GenerateConfig(num_replicas=self.replicas, **values)
