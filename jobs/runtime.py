"""What the driver needs from outside: calls to actors that end some time, and a clock. Ray's is the only one here.

`benchmarks.virtual_time` has another, in which the same driver runs hours of a large cluster within seconds.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import ray


class Runtime(Protocol):
    """Where actors run. A call of an actor's method, `actor.method.remote(...)`, gives a future."""

    def now(self) -> float:
        """Seconds on a clock that only goes forward."""

    def sleep(self, seconds: float) -> None:
        """Do nothing for so long."""

    def wait(self, futures: Sequence[Any], timeout: float) -> list[Any]:
        """Those that are done, in the order of `futures`, as soon as one is; none after `timeout` seconds."""

    def get(self, future: Any, timeout: float | None = None) -> Any:
        """What the call returned.

        Raises:
            RayError: one of Ray's, whatever the runtime: the actor is lost, its method raised, or the time is over.
        """

    def kill(self, actor: Any) -> None:
        """End an actor's process; one that is gone already stays so."""

    def free(self) -> Mapping[str, float]:
        """Resources that nobody has reserved, by Ray's names."""


class RayRuntime:
    """The cluster that this process is connected to, and real time; see `Runtime`."""

    def now(self) -> float:
        """See `Runtime.now`."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """See `Runtime.sleep`."""
        time.sleep(seconds)

    def wait(self, futures: Sequence[Any], timeout: float) -> list[Any]:
        """See `Runtime.wait`."""
        futures = list(futures)
        done, others = ray.wait(futures, timeout=timeout, fetch_local=False)
        if done and others:  # the first is done, and by now perhaps more
            done, _ = ray.wait(futures, num_returns=len(futures), timeout=0, fetch_local=False)
        return done

    def get(self, future: Any, timeout: float | None = None) -> Any:
        """See `Runtime.get`."""
        return ray.get(future, timeout=timeout)

    def kill(self, actor: Any) -> None:
        """See `Runtime.kill`."""
        ray.kill(actor)

    def free(self) -> Mapping[str, float]:
        """See `Runtime.free`."""
        found: Mapping[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
        return found


RAY = RayRuntime()
