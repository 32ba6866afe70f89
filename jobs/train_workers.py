"""Several workers that train one head together, through Ray Train: one GPU each, or cores where there are none."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from ray.exceptions import RayError
from ray.train import RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer, get_device

from jobs.cluster import connected
from jobs.curve import CURVE, described, read_curve
from jobs.files import read_json
from jobs.head_training import run
from jobs.signals import StopSignals
from jobs.train_config import TrainConfig
from pipeline.durable import replace_json
from pipeline.errors import ConfigError, JobError, RasdError
from pipeline.training import workers

_POLL_SECONDS = 0.5

log = logging.getLogger(__name__)


def run_workers(config: TrainConfig, began: float, signals: StopSignals) -> dict[str, Any]:
    """See `jobs.head_training.run`; the output has to be on storage that all nodes see.

    Args:
        signals: entered here, behind Ray's start, which sets handlers of its own.

    Raises:
        JobError: a worker failed; the checkpoint stays.
        ConfigError: the cluster has no room for so many workers.
        RasdError: what a worker refused.
    """
    output = Path(config.output)
    flag, record = output / "_stop", output / "_record.json"
    flag.unlink(missing_ok=True)
    record.unlink(missing_ok=True)
    with connected(config.ray_address) as nodes:
        trainer = TorchTrainer(
            _worker,
            train_loop_config={
                "config": config.model_dump(),
                "seconds": time.monotonic() - began,
                "stop": str(flag),
                "record": str(record),
            },
            scaling_config=_scaling(config, nodes),
            run_config=RunConfig(name="workers", storage_path=str(output / "ray")),
        )

        # Not on the main thread, where Ray Train would take SIGINT for itself.
        with ThreadPoolExecutor(1, "train") as pool, signals:
            fitting = pool.submit(trainer.fit)
            shown = len(read_curve(output / CURVE))
            while not fitting.done():
                wait([fitting], _POLL_SECONDS)
                if signals.received is not None:
                    flag.touch()
                for line in read_curve(output / CURVE)[shown:]:
                    log.info("%s", described(line))
                    shown += 1
    flag.unlink(missing_ok=True)
    if (failure := fitting.exception()) is not None:
        raise _understood(failure)
    found = read_json(record)
    if found is None:
        raise JobError("training ended without a result; see Ray's logs. The same command goes on from the checkpoint.")
    record.unlink()
    return found


def _understood(failure: BaseException) -> BaseException:
    """What a worker refused, as itself; anything else as JobError."""
    for cause in getattr(failure, "worker_failures", {}).values():
        cause = getattr(cause, "cause", cause)
        if isinstance(cause, RasdError):
            return cause
    if not isinstance(failure, TrainingFailedError | RayError):
        return failure
    return JobError(f"training failed: {failure}. The same command goes on from the last checkpoint.")


def _scaling(config: TrainConfig, nodes: Sequence[Mapping[str, float]]) -> ScalingConfig:
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    wants_gpus = config.device == "cuda" or (config.device == "auto" and gpus >= config.num_workers)
    cores = [node.get("CPU", 0.0) for node in nodes]
    room = gpus if wants_gpus else int(sum(math.floor(count) for count in cores))
    if room < config.num_workers:
        kind = "GPUs" if wants_gpus else "cores"
        raise ConfigError(f"--num-workers is {config.num_workers}; the cluster has {room} {kind}. Ask for fewer.")
    if wants_gpus:
        return ScalingConfig(num_workers=config.num_workers, use_gpu=True)
    shares = range(1, int(max(cores)) + 1)
    share = max(n for n in shares if sum(int(count // n) for count in cores) >= config.num_workers)
    # Ray lets a worker compute with as many threads as it has cores.
    return ScalingConfig(num_workers=config.num_workers, use_gpu=False, resources_per_worker={"CPU": float(share)})


def _worker(loop: dict[str, Any]) -> None:
    began = time.monotonic() - loop["seconds"]
    record = run(TrainConfig(**loop["config"]), began, Path(loop["stop"]).exists, get_device())
    if workers.rank() == 0:
        replace_json(Path(loop["record"]), record)
