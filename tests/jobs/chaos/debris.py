"""What a campaign does to a job's files: a full disk, garbage in temporary files, damage to committed ones."""

import os
import random
import re
import subprocess
from pathlib import Path
from types import TracebackType

_RECORD = re.compile(r"\d{6,}\.json")
_BLOCK = 1 << 20
_PAGE = 1 << 12


class Disk:
    """Context manager of a directory on a file system of its own, a small one, where this process may mount it.

    Attributes:
        is_real: whether it may; if not, the directory is like any other and cannot be filled.
    """

    def __init__(self, directory: Path, megabytes: int) -> None:
        self._directory = directory
        self._filler = directory / "filler"
        directory.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "rasd-chaos", str(directory)]
        self.is_real = subprocess.run(command, capture_output=True, check=False).returncode == 0

    def __enter__(self) -> "Disk":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_real:
            subprocess.run(["umount", "--lazy", str(self._directory)], check=False)

    def fill(self) -> None:
        """Take all space that is left."""
        assert self.is_real
        for size in (_BLOCK, _PAGE):
            with self._filler.open("ab", buffering=0) as file:
                try:
                    while file.write(bytes(size)) == size:
                        pass
                except OSError:
                    continue

    def free(self) -> None:
        """Give it back."""
        self._filler.unlink(missing_ok=True)


def corrupt(output: Path, pick: random.Random) -> int:
    """Put garbage into all that is temporary in a job's output, and more of it beside; returns how many files.

    Temporary is what is in a folder whose name begins with `_`, commit records excepted.
    """
    found = [path for path in sorted(output.glob("_*/**/*")) if path.is_file() and not _is_record(path)]
    found += sorted(output.glob("*.tmp"))
    free = next(shard for shard in range(10**6) if not (output / "_commits" / f"{shard:06d}.json").exists())
    names = [f"_tmp/{free:06d}.001000.parquet", "_tmp/000002.001001.parquet.partial", f"part-{free:06d}.parquet"]
    names += [f"_commits/{free:06d}.json", f"_commits/{free:06d}.json.77.tmp"]
    names += ["_lease.77.tmp", "plan.json.77.tmp", "report.json.77.tmp"]
    parts = sorted(output.glob("part-*.parquet"))
    sample = parts[0].read_bytes() if parts else b""
    for path in (*found, *(output / name for name in names)):
        path.parent.mkdir(exist_ok=True)
        whole = path.read_bytes() if path.exists() else sample
        path.write_bytes(whole[: len(whole) // 2] if pick.random() < 0.5 else pick.randbytes(pick.choice([0, 1, 700])))
    return len(found) + len(names)


def damage(output: Path, pick: random.Random) -> bool:
    """Cut or remove a committed part, or tear a commit record; False if nothing is committed."""
    records = [path for path in sorted((output / "_commits").glob("*.json")) if _is_record(path)]
    if not records:
        return False
    record = pick.choice(records)
    part = output / f"part-{record.stem}.parquet"
    kind = pick.choice(["cut", "remove", "tear"])
    if kind == "remove":
        part.unlink(missing_ok=True)
    else:
        path = part if kind == "cut" and part.exists() else record
        os.truncate(path, path.stat().st_size // 2)
    return True


def _is_record(path: Path) -> bool:
    return path.parent.name == "_commits" and _RECORD.fullmatch(path.name) is not None
