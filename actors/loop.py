"""One engine, driven by one thread, fed by many: requests of all shards in flight share its slots.

The engine itself is single-threaded. Callers hand in requests with a queue for their results and never touch it.
"""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue

from pipeline.engine import Engine
from pipeline.errors import JobError, RowError
from pipeline.phases import Phases
from pipeline.request import Generation, Request


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a request: a generation, or the error that stopped it."""

    request_id: int
    result: Generation | RowError | JobError


class EngineLoop:
    """Runs an engine in a thread of its own until `stop`.

    A failure of the engine itself fails every request, present and future: the process is of no more use.

    Args:
        explain: tells from an error what to say of it.
    """

    def __init__(self, engine: Engine, explain: Callable[[BaseException], BaseException] | None = None) -> None:
        self._engine = engine
        self._explain = explain or (lambda error: error)
        self._inbox: deque[tuple[Request, SimpleQueue[Outcome]]] = deque()
        self._waiting: dict[int, SimpleQueue[Outcome]] = {}
        self._wake = threading.Condition()
        self._failure: JobError | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def phases(self) -> Phases:
        """Where the engine's time goes; read it when the loop has stopped."""
        return self._engine.phases

    def submit(self, request: Request, outcomes: "SimpleQueue[Outcome]") -> None:
        """Queues a request; its outcome will be put into `outcomes`, from another thread."""
        with self._wake:
            if self._failure is not None:
                outcomes.put(Outcome(request.request_id, self._failure))
                return
            self._inbox.append((request, outcomes))
            self._wake.notify()

    def stop(self) -> None:
        """Ends the thread after its current round; requests not finished fail."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._take():
                # A request that was refused leaves an idle engine idle.
                for generation in self._engine.step() if self._engine.has_work else ():
                    self._waiting.pop(generation.request_id).put(Outcome(generation.request_id, generation))
            self._fail(
                JobError("The replica was stopped before the row was finished; the same command resumes the job.")
            )
        except BaseException as error:
            told = self._explain(error)
            self._fail(JobError(f"The engine failed: {type(told).__name__}: {told}"))
            raise

    def _take(self) -> bool:
        """Moves new requests into the engine, waiting while there is nothing to do; False when it is time to stop."""
        with self._wake:
            while not (self._inbox or self._engine.has_work or self._stopping):
                with self._engine.phases("idle"):
                    self._wake.wait()
            arrived = list(self._inbox)
            self._inbox.clear()
        for request, outcomes in arrived:
            try:
                self._engine.submit(request)
            except RowError as error:
                outcomes.put(Outcome(request.request_id, error))
            else:
                self._waiting[request.request_id] = outcomes
        return not self._stopping

    def _fail(self, failure: JobError) -> None:
        with self._wake:
            self._failure = failure
            self._waiting.update((request.request_id, outcomes) for request, outcomes in self._inbox)
            self._inbox.clear()
        for request_id, outcomes in self._waiting.items():
            outcomes.put(Outcome(request_id, failure))
        self._waiting.clear()
