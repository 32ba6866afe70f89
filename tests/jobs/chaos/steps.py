"""The campaign's side of `site/sitecustomize.py`: which steps there are, and before which one a process is to end."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[3]
SITE = Path(__file__).with_name("site")


class Steps:
    """Faults at steps of the processes of one campaign, which inherit its environment.

    Args:
        directory: of the campaign; its folder `outputs` holds the outputs of its jobs.
    """

    def __init__(self, directory: Path) -> None:
        self._fault = directory / "fault.json"
        self._record = directory / "steps.txt"

    @staticmethod
    def environment(directory: Path) -> dict[str, str]:
        """What all processes of the campaign must have, those that Ray starts included."""
        path = os.pathsep.join([str(SITE), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {"RASD_CHAOS": str(directory), "PYTHONPATH": path}

    def arm(self, step: str, occurrence: int, *, is_full: bool = False) -> None:
        """The first process that is about to do this step so many times ends, or finds the disk full."""
        beside = self._fault.with_suffix(".new")
        beside.write_text(json.dumps({"step": step, "occurrence": occurrence, "is_full": is_full}))
        beside.replace(self._fault)

    def disarm(self) -> bool:
        """Whether the fault had struck; if not, it does not any more."""
        try:
            self._fault.unlink()
        except FileNotFoundError:
            return True
        return False

    def start_recording(self) -> None:
        """Note every step from now on."""
        self._record.touch()

    def stop_recording(self, driver: int) -> tuple[Mapping[str, int], Mapping[str, int]]:
        """How often each step was done, by the process `driver` and by all others."""
        of_driver: Counter[str] = Counter()
        of_others: Counter[str] = Counter()
        for line in self._record.read_text().splitlines():
            pid, _, step = line.partition(" ")
            (of_driver if int(pid) == driver else of_others)[step] += 1
        self._record.unlink()
        return of_driver, of_others
