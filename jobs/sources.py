"""From what the user names (files, directories, patterns, data sets) to readers, sorted by path."""

import glob
import itertools
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from jobs.readers import Formats
from jobs.readers.base import Reader
from pipeline.errors import InputError

_LOG = logging.getLogger(__name__)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+){0,2}")


def find_readers(specs: Sequence[str], formats: Formats) -> tuple[Reader, ...]:
    """A reader for each file and data set, sorted by path; a file named twice is read once.

    Args:
        formats: the files that count; others are ignored in directories.

    Raises:
        InputError: something named does not exist, cannot be read, or holds nothing that can be.
    """
    readers: dict[str, Reader] = {}
    for spec in specs:
        if _is_hub_name(spec, formats):
            readers.setdefault(spec, _hub_reader(spec))
            continue
        root, paths = _expand(spec, formats)
        for path in paths:
            if str(path) not in readers:
                readers[str(path)] = _reader(path, root, formats)
    if not readers:
        raise InputError(f"no {formats.what} are given. Name a file, a directory, a pattern or a data set.")
    return tuple(readers[key] for key in sorted(readers))


def _is_hub_name(spec: str, formats: Formats) -> bool:
    """Whether it can only be a data set's name; `data/promts` beside a directory `data` is a slip, not a name."""
    path = Path(spec)
    is_path = os.path.lexists(path) or formats.of(path) or (len(path.parts) > 1 and path.parent.is_dir())
    return not is_path and bool(_HUB_NAME.fullmatch(spec))


def _expand(spec: str, formats: Formats) -> tuple[Path, list[Path]]:
    """The directory that names are relative to, and the absolute paths of all files and saved data sets."""
    path = Path(os.path.abspath(spec))
    if "://" in spec:
        raise InputError(f"{spec} is not on a local file system. Copy or mount it first.")
    if os.path.lexists(path):
        inside = path.is_dir() and not _is_saved_dataset(path)
        return path if inside else path.parent, _inputs(path, formats)
    if glob.has_magic(spec):
        return _expand_pattern(path, formats)
    raise InputError(f"{path} does not exist. Check the path.")


def _expand_pattern(pattern: Path, formats: Formats) -> tuple[Path, list[Path]]:
    matches = [Path(match) for match in glob.glob(str(pattern), recursive=True)]
    if not matches:
        raise InputError(f"no file matches {pattern}. Check the pattern; quote it if a shell may have changed it.")
    plain = itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts)
    return Path(*plain), [path for match in matches for path in _inputs(match, formats)]


def _inputs(path: Path, formats: Formats) -> list[Path]:
    if path.is_dir():
        return [path] if _is_saved_dataset(path) else _files_below(path, formats)
    if path.is_file():
        return [path]
    raise InputError(f"{path} is not a regular file, and inputs are read more than once. Save it as a file.")


def _files_below(root: Path, formats: Formats) -> list[Path]:
    """Files of known formats, but for names that start with `.` or `_`, as those of markers do, and jobs' outputs."""
    if _is_datastore(root):
        raise InputError(f"{root} is a datastore, which holds no {formats.what}. Name what it was built from.")
    if _is_job_output(root):
        raise InputError(f"{root} is the output of a job. To read its rows, name its files: {root}/part-*.parquet.")
    found: list[Path] = []
    ignored: list[Path] = []
    for folder, folders, names in os.walk(root, onerror=_unreadable):
        kept = (name for name in folders if not name.startswith((".", "_")))
        folders[:] = [name for name in kept if not _is_ours(Path(folder, name))]
        for path in (Path(folder, name) for name in names if not name.startswith((".", "_"))):
            (found if formats.of(path) else ignored).append(path)
    if not found:
        raise InputError(f"{root} holds no file of a known format. Known are {', '.join(formats.names)}.")
    if ignored:
        shown = ", ".join(sorted(path.name for path in ignored)[:5])
        _LOG.warning("%s: ignoring %d files of unknown formats: %s", root, len(ignored), shown)
    return found


def _unreadable(error: OSError) -> None:
    raise InputError(f"cannot read the directory {error.filename}: {error.strerror}. Check its permissions.") from error


def _is_job_output(path: Path) -> bool:
    return (path / "_commits").exists() or (path / "_lease").exists()


def _is_datastore(path: Path) -> bool:
    return (path / "segments").is_dir() and ((path / "manifest.json").exists() or (path / "build.json").exists())


def _is_ours(path: Path) -> bool:
    return _is_job_output(path) or _is_datastore(path)


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (
        (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    )


def _reader(path: Path, root: Path, formats: Formats) -> Reader:
    # Names of bytes that are not UTF-8 could be neither logged nor written to the plan.
    name = os.fsencode(path.relative_to(root).as_posix()).decode(errors="backslashreplace")
    if path.is_dir():
        from jobs.readers.dataset import saved_dataset  # importing `datasets` takes seconds

        return saved_dataset(path, name)
    return formats.open(path, name)


def _hub_reader(spec: str) -> Reader:
    from jobs.readers.dataset import hub_dataset  # importing `datasets` takes seconds

    return hub_dataset(spec)
