"""From a checked configuration to a running job: inputs, model, plan and lease, or with `--dry-run` the plan alone."""

import time
from pathlib import Path
from typing import Any

from jobs.backend import Backend
from jobs.config import GenerateConfig
from jobs.facts import estimate_memory
from jobs.files import read_json
from jobs.inputs import open_inputs
from jobs.job import Job
from jobs.lease import Lease
from jobs.plan import Plan, make_plan
from jobs.report import print_table
from pipeline.errors import ConfigError
from pipeline.methods import method_named


def generate(config: GenerateConfig, backend: Backend) -> int:
    """Run one job, or what is left of it.

    Raises:
        RasdError: see `pipeline.errors` for the kinds; what is committed stays.
    """
    began = time.monotonic()
    method = method_named(config.method).name
    inputs = open_inputs(config.prompts, text_column=config.text_column)
    facts = backend.facts(config)
    output = Path(config.output)
    plan = make_plan(config, inputs, facts, _recorded_plan(output))
    if config.dry_run:
        _print_plan(plan, config, method)
        return 0
    try:
        output.mkdir(parents=True, exist_ok=True)
        lease = Lease(output)
    except OSError as error:
        raise ConfigError(f"--output is {config.output!r}; it cannot be written: {error.strerror}.") from error
    with lease:
        # Planned again: until the lease was ours, another driver may have written a plan.
        recorded = _recorded_plan(output)
        job = Job(config, backend, make_plan(config, inputs, facts, recorded), method, output, lease)
        return job.run(inputs, (recorded or {}).get("attempts", []), began)


def _recorded_plan(output: Path) -> dict[str, Any] | None:
    """The plan of a directory that is to be resumed; None for a new or empty one.

    Raises:
        ConfigError: the directory is something else.
    """
    try:
        names = {path.name for path in output.iterdir()} if output.exists() else set()
    except OSError as error:
        raise ConfigError(
            f"--output is {str(output)!r}; it is no directory that can be read: {error.strerror}."
        ) from error
    plan = read_json(output / "plan.json")
    if plan is not None and "fingerprint" in plan:
        return plan
    strange = sorted(name for name in names if not name.startswith(("_lease", "plan.json.")))
    if strange:
        raise ConfigError(
            f"--output is {str(output)!r}; it holds {strange[0]!r} but no plan of this program. Choose a new or empty"
            " directory."
        )
    return None


def _print_plan(plan: Plan, config: GenerateConfig, method: str) -> None:
    memory = estimate_memory(config)
    gib = 1 << 30
    print_table(
        [
            ("rows", f"{plan.num_rows} prompts x {plan.num_samples} samples = {plan.num_output_rows} output rows"),
            ("shards", f"{plan.num_shards} of up to {plan.rows_per_shard} prompts"),
            *(("input", f"{file['path']}: {file['rows']} rows, {file['bytes']} bytes") for file in plan.inputs),
            ("model", f"{config.model}, {memory.dtype}"),
            ("method", method),
            ("replicas", config.num_replicas),
            ("memory", f"{memory.weights / gib:.2f} GiB weights a replica"),
            ("", f"{memory.kv / gib:.2f} GiB KV at most: {config.slots} slots x {memory.max_context} tokens"),
            *(("column", f"{field.name}: {field.type}") for field in plan.schema),
        ]
    )
