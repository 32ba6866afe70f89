"""From a checked configuration to a running job: inputs, model, plan and lease, or with `--dry-run` the plan alone."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actors.object_store import is_uri
from jobs.backend import Backend, Retrieving
from jobs.commit import read_commits
from jobs.config import GenerateConfig
from jobs.dry_run import print_plan
from jobs.inputs import open_inputs
from jobs.job import Job
from jobs.plan import make_plan
from jobs.storage import Storage, open_storage, read_plan
from pipeline.errors import ConfigError
from pipeline.methods import method_named


def generate(config: GenerateConfig, backend: Backend) -> int:
    """Run one job, or what is left of it.

    Raises:
        RasdError: see `pipeline.errors` for the kinds; what is committed stays.
    """
    began = time.monotonic()
    method_named(config.method)  # an unknown name is told before the inputs are read
    output = open_output(config.output)
    _check_trace(config.trace)
    inputs = open_inputs(config.prompts, text_column=config.text_column)
    facts = backend.facts(config)
    sources = backend.sources(config, facts)
    method = method_named(config.method, sources).name
    plan = make_plan(config, inputs, facts, _binding(_recorded_plan(output), output))
    if config.dry_run:
        print_plan(plan, config, method, backend.memory(config))
        return 0
    try:
        output.prepare()
        lease = output.lease()
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"--output is {config.output!r}; it cannot be written: {reason}.") from error
    with lease:
        # Planned again: until the lease was ours, another driver may have written a plan.
        recorded = _recorded_plan(output)
        plan = make_plan(config, inputs, facts, _binding(recorded, output))
        job = Job(config, backend, plan, facts, Retrieving(method, sources), output, lease)
        return job.run(inputs, (recorded or {}).get("attempts", []), began)


def _check_trace(name: str | None) -> None:
    """Refuses a trace that could not be written when the job is done."""
    if name is not None and not os.access(Path(name).expanduser().absolute().parent, os.W_OK | os.X_OK):
        raise ConfigError(f"--trace is {name!r}; its directory does not exist or cannot be written to. Choose another.")


def open_output(name: str) -> Storage:
    """What `--output` of a generation job names.

    Raises:
        ConfigError: it would be removed with the submitted job's working directory, or is a URI that cannot be used.
    """
    if name.startswith("file:///"):
        name = name.removeprefix("file://")
    elif name.startswith("file:"):
        raise ConfigError(f"--output is {name!r}; give the directory itself, or file:/// and its absolute path.")
    return open_storage(name if is_uri(name) else output_directory(name))


def output_directory(name: str) -> Path:
    """Where an `--output` is that can only be a directory.

    Raises:
        ConfigError: it would be removed with the submitted job's working directory, or is a URI.
    """
    if is_uri(name):
        raise ConfigError(f"--output is {name!r}; this command writes to a directory. Give one that all nodes see.")
    output = Path(name).expanduser()
    # Set by Ray's job server, which runs the command in a temporary copy of the submitted directory.
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and not output.is_absolute():
        raise ConfigError(
            f"--output is {name!r}; a submitted job runs in a directory that Ray removes. Give an absolute"
            " path that all nodes see."
        )
    return output


def _recorded_plan(output: Storage) -> dict[str, Any] | None:
    """The plan of an output that is to be resumed; None for a new or empty one.

    Raises:
        ConfigError: it holds something else, or cannot be read.
    """
    try:
        names = output.names()
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"--output is {output.where()!r}; it is no directory that can be read: {reason}.") from error
    plan = read_plan(output)
    if plan is not None and "fingerprint" in plan:
        return plan
    strange = sorted(name for name in names if not name.startswith(("_lease", "plan.json.")))
    if strange:
        raise ConfigError(
            f"--output is {output.where()!r}; it holds {strange[0]!r} but no plan of this program. Choose a new or"
            " empty directory."
        )
    return None


def _binding(recorded: Mapping[str, Any] | None, output: Storage) -> Mapping[str, Any] | None:
    """A recorded plan binds once there are rows made by it; before, a mistaken option can simply be corrected."""
    has_rows = output.progress_shards() or any(commit for commit, _ in read_commits(output))
    return recorded if has_rows else None
