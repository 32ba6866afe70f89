"""A campaign: jobs whose processes are killed until so many kills are done, then compared with an undisturbed one.

Each job is run with the same command until it ends well. Meanwhile a schedule, drawn by the seed, says what strikes;
what has not struck when a run ends is left to a later run. Processes are real and so is their timing: the same seed
gives the same faults, not the same interleaving.
"""

import logging
import random
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.jobs.chaos.debris import Disk, corrupt, damage
from tests.jobs.chaos.faults import KILLS, Fault, Schedule, make_faults
from tests.jobs.chaos.nodes import Nodes
from tests.jobs.chaos.steps import ROOT, Steps
from tests.jobs.chaos.work import Differences, Work, compare, is_intact, rows_of

RUN_SECONDS = 180.0
_MOST_RUNS = 40  # of one job
_FULL_STEPS = ("fsync _tmp/N.N.parquet.partial", "fsync _commits/N.json.N.tmp")  # where no disk can be filled

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Outcome:
    """What happened.

    Attributes:
        struck: faults by kind; steps: kills by the step before which they came.
        runs: of drivers under attack, the last one of each job included; jobs: that were done and compared.
        problems: what should not have happened, besides differences of rows.
    """

    struck: Counter[str] = field(default_factory=Counter)
    steps: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    jobs: int = 0
    rows: int = 0
    corrupted_files: int = 0
    damaged: int = 0
    differences: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    @property
    def num_kills(self) -> int:
        return sum(self.struck[kind] for kind in KILLS)


class Campaign:
    """Runs jobs under attack.

    Args:
        directory: of the campaign, whose steps and outputs are there.
        until: on the monotonic clock; nothing strikes afterwards.
    """

    def __init__(
        self, directory: Path, work: Work, nodes: Nodes, disk: Disk, num_kills: int, seed: int, until: float
    ) -> None:
        self.outcome = Outcome()
        self._outputs = directory / "outputs"
        self._log = directory / "driver.log"
        self._steps = Steps(directory)
        self._work = work
        self._nodes = nodes
        self._disk = disk
        self._num_kills = num_kills
        self._pick = random.Random(seed)
        self._until = until
        self._schedule = Schedule([])
        self._second: subprocess.Popen[bytes] | None = None  # driver on the same output
        self._wanted: list[dict[str, Any]] = []

    def run(self) -> Outcome:
        """The undisturbed job, then others until every fault has struck or the time is up."""
        self._run_undisturbed()
        while self._is_going_on():
            self._run_job(self._outputs / f"job-{self.outcome.jobs}")
        return self.outcome

    def _is_going_on(self) -> bool:
        return bool(self._schedule) and time.monotonic() < self._until

    def _run_undisturbed(self) -> None:
        self._steps.start_recording()
        output = self._outputs / "undisturbed"
        process = self._start(output)
        code = process.wait(RUN_SECONDS)
        assert code == 0, self._log.read_text()
        of_driver, of_replicas = self._steps.stop_recording(process.pid)
        self._wanted = rows_of(output)
        assert len(self._wanted) == self._work.num_output_rows
        # Rows are kept every few seconds, which a faster job than this one, where code was compiled, never comes to.
        timeless = [
            {step: count for step, count in steps.items() if "_progress/" not in step}
            for steps in (of_driver, of_replicas)
        ]
        faults = make_faults(self._num_kills, *timeless, self._pick)
        if not self._disk.is_real:
            steps = [pick for pick in _FULL_STEPS if pick in {**of_driver, **of_replicas}]
            faults = [
                Fault(fault.kind, 0, 0.0, 0.0, self._pick.choice(steps)) if fault.kind == "disk full" else fault
                for fault in faults
            ]
        self._schedule = Schedule(faults)

    def _run_job(self, output: Path) -> None:
        for _ in range(_MOST_RUNS):
            faults = self._schedule.next_run() if self._is_going_on() else []
            if self._drive(output, faults) == 0:
                break
            if (output / "plan.json").exists():
                self._leave_debris(output)
        else:
            self.outcome.problems.append(f"{output.name} was not done after {_MOST_RUNS} runs")
        found: Differences = compare(output, self._wanted)
        is_good, printed = is_intact(output)
        if not is_good:
            self.outcome.problems.append(f"rasd verify: {printed}")
        self.outcome.jobs += 1
        self.outcome.rows += self._work.num_output_rows
        for name in ("missing", "doubled", "different"):
            self.outcome.differences[name] += getattr(found, name)
        log.info("%s is done: %s; %d kills so far", output.name, found, self.outcome.num_kills)

    def _leave_debris(self, output: Path) -> None:
        if self._pick.random() < 0.6:
            self.outcome.corrupted_files += corrupt(output, self._pick)
        if self._pick.random() < 0.25 and damage(output, self._pick):
            self.outcome.damaged += 1

    def _start(self, output: Path) -> "subprocess.Popen[bytes]":
        with self._log.open("wb") as stderr:
            command = self._work.command(output, self._nodes.address)
            return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stderr)

    def _drive(self, output: Path, faults: list[Fault]) -> int:
        """One run of the driver; its exit code."""
        begin = time.monotonic()
        armed = next((fault for fault in faults if fault.step), None)
        if armed is not None:
            self._steps.arm(armed.step, armed.occurrence, is_full=armed.kind == "disk full")
        waiting = [fault for fault in faults if not fault.step]
        process = self._start(output)
        self._attack(process, output, waiting)
        if armed is not None and not self._steps.disarm():
            waiting.append(armed)
        struck = [fault for fault in faults if fault not in waiting]
        struck, missed = self._judge(process.returncode, struck)
        self._schedule.put_back(waiting + missed)
        self.outcome.struck.update(fault.kind for fault in struck)
        self.outcome.steps.update(fault.step for fault in struck if fault.step)
        self.outcome.runs += 1
        if any(fault.kind == "disk full" for fault in struck) and self._disk.is_real:
            self._try_on_full_disk(output)
        self._disk.free()
        self._nodes.mend()
        names = ", ".join(fault.kind + (f" ({fault.step})" if fault.step else "") for fault in struck) or "nothing"
        log.info("%s: %s, exit code %d, %.0f s", output.name, names, process.returncode, time.monotonic() - begin)
        return int(process.returncode)

    def _attack(self, process: "subprocess.Popen[bytes]", output: Path, waiting: list[Fault]) -> None:
        """Until the driver ends; leaves in `waiting` what did not strike."""
        before, end = _commits(output), time.monotonic() + RUN_SECONDS
        reached: dict[Fault, float] = {}
        while process.poll() is None:
            now = time.monotonic()
            if now > end:
                self.outcome.problems.append(f"a run took longer than {RUN_SECONDS:.0f} s: {self._said()}")
                process.kill()
            done = _commits(output) - before
            for fault in list(waiting):
                is_due = done >= fault.after and now - reached.setdefault(fault, now) >= fault.delay
                if is_due and self._strike(fault, process, output):
                    waiting.remove(fault)
            time.sleep(0.02)

    def _strike(self, fault: Fault, process: "subprocess.Popen[bytes]", output: Path) -> bool:
        match fault.kind:
            case "driver":
                process.kill()
            case "disk full":
                self._disk.fill()
            case "replica":
                return _kill_one(self._nodes.actors("Replica"), fault.pick)
            case "retrieval":
                return _kill_one(self._nodes.actors("RetrievalService"), fault.pick)
            case "raylet":
                return self._nodes.kill_raylet(fault.pick)
            case "duplicate":
                if not (output / "_lease").exists():
                    return False
                command = self._work.command(output, self._nodes.address)
                self._second = subprocess.Popen(
                    command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
                )
        return True

    def _judge(self, code: int, struck: list[Fault]) -> tuple[list[Fault], list[Fault]]:
        """Whether a run ended as it should; the faults that struck, and those that came too late to."""
        missed = []
        lead = next((fault for fault in struck if fault.kind in ("driver", "driver step", "disk full")), None)
        expected = 0 if lead is None else 1 if lead.kind == "disk full" else -signal.SIGKILL
        said = self._said()
        if code == 0 and lead is not None and not lead.step:
            missed.append(lead)  # it was just done
        elif code != expected or "Traceback" in said:
            kinds = [fault.kind for fault in struck]
            self.outcome.problems.append(f"exit code {code}, not {expected}, after {kinds}: {said}")
        elif expected == 1 and "No space left on device" not in said:
            self.outcome.problems.append(f"the full disk is not named: {said}")
        for fault in struck:
            if fault.kind == "duplicate" and not self._was_refused(code):
                missed.append(fault)
        return [fault for fault in struck if fault not in missed], missed

    def _was_refused(self, first_code: int) -> bool:
        """How the second driver of an output ended."""
        assert self._second is not None
        _, stderr = self._second.communicate(timeout=RUN_SECONDS)
        code, self._second = self._second.returncode, None
        if code == 0 and first_code == 0:
            return False  # the first one was done before it looked
        if code != 2 or b"is in use by process" not in stderr:
            self.outcome.problems.append(f"a second driver ended with {code}: {stderr.decode()[-600:]}")
        return True

    def _try_on_full_disk(self, output: Path) -> None:
        code = self._start(output).wait(RUN_SECONDS)
        said = self._said()
        if code not in (1, 2) or "rasd: error:" not in said or "Traceback" in said:
            self.outcome.problems.append(f"exit code {code} on a full disk: {said}")

    def _said(self) -> str:
        return self._log.read_text(errors="replace")[-1500:]


def _commits(output: Path) -> int:
    return len(list((output / "_commits").glob("*.json")))


def _kill_one(processes: list[psutil.Process], pick: float) -> bool:
    if not processes:
        return False
    try:
        processes[int(pick * len(processes))].kill()
    except psutil.NoSuchProcess:
        return False
    return True
