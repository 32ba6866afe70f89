"""The plan of a job: how its rows fall into shards, and the fingerprint of what fixes its text (design section 8).

`plan.json` is written before any work. A second run must have the same fingerprint; how the work is done (replicas,
slots, method, budget) may change and is recorded for each attempt.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa

from actors.records import output_schema, passthrough_names
from actors.rows import ReplicaInfo
from jobs.config import GenerateConfig
from jobs.inputs import Inputs
from pipeline.errors import ConfigError

VERSION = 1
AUTO_SHARDS = 64
AUTO_SHARD_ROWS = (8, 256)
UNSET = "auto"

# Known only once a replica has loaded the model; fixed by the first one, for every other one and every resume.
RESOLVED_BY_REPLICA = ("dtype", "max_context")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Identity of a target: two models that agree in all of it generate the same text.

    Attributes:
        name: what the user wrote after `--model`; not part of the identity.
        weights: digest or hub commit of the model's files.
        tokenizer: digest of vocabulary and special tokens.
        chat_template: digest of the chat template; None if the model has none.
    """

    name: str
    revision: str | None
    weights: str
    tokenizer: str
    chat_template: str | None


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes one replica needs, before activations.

    Attributes:
        weights: of all parameters.
        kv_per_token: of one token in every layer; sliding windows are counted as full attention.
        slots: decoded at a time, at most.
        kv: of all slots at the longest context.
    """

    dtype: str
    max_context: int
    weights: int
    kv_per_token: int
    slots: int
    kv: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that determines the output, and where each row of it goes.

    Attributes:
        num_rows: input rows; each gives `num_samples` output rows.
        prompt_columns: which of `prompt` and `messages` the inputs have.
        extra: types of the pass-through columns under their own names.
        schema: of the part files.
        renamed: output name of each pass-through column.
        fingerprint: flat; equal fingerprints mean equal output.
        inputs: for each file its path, rows, bytes and sha256.
    """

    num_rows: int
    num_samples: int
    rows_per_shard: int
    prompt_columns: tuple[str, ...]
    extra: pa.Schema
    schema: pa.Schema
    renamed: Mapping[str, str]
    fingerprint: Mapping[str, Any]
    inputs: tuple[Mapping[str, Any], ...]

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.rows_per_shard)

    @property
    def num_output_rows(self) -> int:
        return self.num_rows * self.num_samples

    def shard_rows(self, shard: int) -> range:
        """Row indices of a shard."""
        return shard_rows(shard, self.rows_per_shard, self.num_rows)


def shard_rows(shard: int, rows_per_shard: int, num_rows: int) -> range:
    """Row indices of a shard of a job."""
    return range(shard * rows_per_shard, min((shard + 1) * rows_per_shard, num_rows))


def make_plan(
    config: GenerateConfig,
    inputs: Inputs,
    facts: ModelFacts,
    recorded: Mapping[str, Any] | None,
) -> Plan:
    """Plan a job, or plan it again as `recorded` did.

    Args:
        recorded: the directory's plan.json, if it has one; fills in what this configuration leaves to the program.

    Raises:
        ConfigError: the recorded fingerprint differs; the message lists each difference.
    """
    old: Mapping[str, Any] = recorded["fingerprint"] if recorded is not None else {}
    summary, extra, prompts = inputs.summary(), inputs.extra_schema(), inputs.prompt_columns()
    schema = output_schema(prompts, extra, logprobs=config.logprobs)
    rows_per_shard = config.rows_per_shard
    if rows_per_shard == "auto":
        rows_per_shard = old.get("rows_per_shard") or _auto_rows_per_shard(summary.num_rows)
    fingerprint = {
        "num_rows": summary.num_rows,
        "inputs": _digest([file.sha256 for file in summary.files]),
        "text_column": config.text_column,
        **{key: value for key, value in asdict(facts).items() if key != "name"},
        **asdict(config.sampling()),
        # Left out where there is none, as in plans of earlier versions.
        **({"quantization": config.quantization} if config.quantization != "none" else {}),
        "seed": config.seed,
        "num_samples": config.num_samples,
        "rows_per_shard": rows_per_shard,
        **{f"column {field.name}": str(field.type) for field in schema},
        **{key: _left_to_replica(getattr(config, key), old.get(key, UNSET)) for key in RESOLVED_BY_REPLICA},
    }
    plan = Plan(
        num_rows=summary.num_rows,
        num_samples=config.num_samples,
        rows_per_shard=rows_per_shard,
        prompt_columns=prompts,
        extra=extra,
        schema=schema,
        renamed=passthrough_names(extra.names),
        fingerprint=json.loads(json.dumps(fingerprint)),
        inputs=tuple(asdict(file) for file in summary.files),
    )
    if recorded is not None:
        _refuse_changes(old, plan.fingerprint, config.output)
    return plan


def bind(plan: Plan, info: ReplicaInfo) -> Plan:
    """The plan with what a replica decided; a later replica must decide the same.

    Raises:
        ConfigError: it did not, so that its rows would differ from those of the others.
    """
    fixed = dict(plan.fingerprint)
    for key in RESOLVED_BY_REPLICA:
        wanted, found = fixed[key], getattr(info, key)
        if wanted not in (UNSET, found):
            raise ConfigError(
                f"replica {info.replica} on {info.node} has {key} {found}, but this job's is {wanted}. Give"
                f" --{key.replace('_', '-')} a value that all nodes support, with another --output."
            )
        fixed[key] = found
    return replace(plan, fingerprint=fixed)


def plan_record(plan: Plan, config: GenerateConfig, attempts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What plan.json holds.

    Args:
        attempts: one entry a run of the driver, oldest first.
    """
    return {
        "version": VERSION,
        "fingerprint": dict(plan.fingerprint),
        "num_rows": plan.num_rows,
        "num_shards": plan.num_shards,
        "rows_per_shard": plan.rows_per_shard,
        "inputs": list(plan.inputs),
        "config": config.model_dump(mode="json"),
        "attempts": list(attempts),
    }


def _auto_rows_per_shard(num_rows: int) -> int:
    low, high = AUTO_SHARD_ROWS
    return min(max(num_rows // AUTO_SHARDS, low), high)


def _left_to_replica(asked: Any, recorded: Any) -> Any:
    return recorded if asked == UNSET else asked


def _digest(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _refuse_changes(old: Mapping[str, Any], new: Mapping[str, Any], output: str) -> None:
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key) and _matters(key, old)]
    if not changed:
        return
    lines = "; ".join(f"{key}: {_short(old.get(key))} -> {_short(new.get(key))}" for key in changed)
    raise ConfigError(
        f"--output {output} holds a job that would give other text: {lines}. Restore those options to resume it, or"
        " choose another --output."
    )


def _matters(key: str, old: Mapping[str, Any]) -> bool:
    # Nothing was generated before a replica fixed these.
    return not (key in RESOLVED_BY_REPLICA and old.get(key) == UNSET)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 48 else f"{text[:45]}..."
