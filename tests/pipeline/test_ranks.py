"""A target that several processes share decodes as a whole one does, and no process outlives another."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed
from transformers import PreTrainedModel

from pipeline.assemble import PAGE_SIZE, EngineOptions, build_engine
from pipeline.errors import ConfigError, ModelError
from pipeline.head_files import load_head, save_head
from pipeline.methods import method_named
from pipeline.models import load_causal_lm, resolve_model
from pipeline.packing import Run, Runs
from pipeline.pages import PageRun
from pipeline.ranks import End, Gather, Ranks, check_shares, host_store, sharing_device
from pipeline.request import Generation, Request, SamplingParams
from pipeline.target import Target, kv_shape
from pipeline.tree import TokenTree
from tests.models import ARCHITECTURES, VOCABULARY, tiny_model
from tests.pipeline.test_engine_architectures import NoText
from tests.pipeline.test_head import head_for

pytestmark = pytest.mark.skipif(sharing_device() != "cpu", reason="shares models on GPUs alone")
ROOT = Path(__file__).parents[2]
SOURCES = ("draft", "context", "passages")
TREE = TokenTree.of([5, 6, 7, 8], [-1, -1, 0, 2], "draft")


@dataclass
class Shared:
    """A model, the leader's share of it, and the other processes."""

    model: PreTrainedModel
    ranks: Ranks
    followers: "list[subprocess.Popen[bytes]]"


@contextlib.contextmanager
def shared(directory: Path, size: int) -> Iterator[Shared]:
    store, port = host_store()
    command = [sys.executable, "-m", "tests.pipeline.following_process", str(directory)]
    followers = [subprocess.Popen([*command, str(rank), str(size), str(port)], cwd=ROOT) for rank in range(1, size)]
    try:
        ranks = Ranks(store, 0, size, "cpu")
        model = load_causal_lm(resolve_model(str(directory)), torch.float32, "cpu", num_ranks=size)
        yield Shared(model, ranks, followers)
        ranks.tell(End())
        assert [follower.wait(30) for follower in followers] == [0] * (size - 1)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
        for follower in followers:
            follower.kill()
            follower.wait()


def saved(architecture: str, directory: Path) -> Path:
    """A model with its own head, on disk."""
    tiny_model(architecture).save_pretrained(directory)
    save_head(head_for(architecture), directory / "head")
    return directory


def prompts() -> list[tuple[int, ...]]:
    random = np.random.default_rng(5)
    return [tuple(random.integers(3, VOCABULARY, 12).tolist()) * 3 for _ in range(6)]


def outputs_of(
    model: PreTrainedModel,
    head: Path,
    ranks: Ranks | None,
    options: EngineOptions,
    temperature: float,
    passages: Sequence[Generation] = (),
) -> list[Generation]:
    """Outputs in order.

    Args:
        passages: what retrieval finds for each prompt.
    """
    if ranks is not None:
        ranks.tell(Gather())
    draft = load_head(head, model, "target")
    method = method_named("rasd", SOURCES)
    engine = build_engine(model, NoText(), method, options, (), draft, ranks)  # type: ignore[arg-type]
    params = SamplingParams(max_new_tokens=30, temperature=temperature)
    found = [(np.array(output.token_ids, np.int32),) for output in passages] or [()] * len(prompts())
    requests = [Request(i, prompt, params, i, found[i]) for i, prompt in enumerate(prompts())]
    return sorted(engine.generate(requests), key=lambda generation: generation.request_id)


@pytest.mark.parametrize("is_static", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "phi3"])
def test_outputs_are_those_of_the_whole_model(architecture: str, is_static: bool, tmp_path: Path) -> None:
    """With trees of a head, of context and of passages that hold the answers; of phi3 each process has all heads."""
    saved(architecture, tmp_path)
    whole = load_causal_lm(resolve_model(str(tmp_path)), torch.float32, "cpu")
    memory = 20 * PAGE_SIZE * kv_shape(whole).bytes_per_token
    options = EngineOptions(num_slots=3, budget=12, prefill_chunk=16, kv_memory=memory, is_static=is_static)
    for temperature in (0.0, 1.0) if architecture == "llama" else (0.0,):
        expected = outputs_of(whole, tmp_path / "head", None, options, temperature)
        with shared(tmp_path, 2) as share:
            found = outputs_of(share.model, tmp_path / "head", share.ranks, options, temperature, expected)
        assert [output.token_ids for output in found] == [output.token_ids for output in expected]
        assert sum(output.accepted for output in found) > 60


def test_each_process_has_its_heads_and_all_logits_are_those_of_the_whole_model(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    runs = Runs.of([Run(np.array([9], np.int32), TREE, 0, PageRun.of([0]), True)], 16)
    whole = Target(tiny_model("llama"), 4, 16)
    expected = whole.forward(runs).logits
    with shared(tmp_path, 2) as share:
        target = Target(share.model, 4, 16, ranks=share.ranks)
        found = target.forward(runs).logits
    assert (whole.cache.shape.num_kv_heads, target.cache.shape.num_kv_heads) == (2, 1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_leader_notices_that_a_follower_is_gone(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    runs = Runs.of([Run(np.array([9], np.int32), TREE, 0, PageRun.of([0]), True)], 16)
    with pytest.raises(RuntimeError), shared(tmp_path, 2) as share:
        target = Target(share.model, 4, 16, ranks=share.ranks)
        target.forward(runs)
        share.followers[0].kill()
        share.followers[0].wait()
        for _ in range(3):
            target.forward(runs)


LEADER = """
import sys, time
from pipeline.models import load_causal_lm, resolve_model
from pipeline.ranks import Ranks, host_store
store, port = host_store()
print(port, flush=True)
ranks = Ranks(store, 0, 2, "cpu")
load_causal_lm(resolve_model(sys.argv[1]), "float32", "cpu", num_ranks=2)
print("idle", flush=True)
time.sleep(100)
"""


def test_a_follower_that_waits_for_work_ends_when_its_leader_does(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    leader = subprocess.Popen(
        [sys.executable, "-c", LEADER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert leader.stdout is not None
    port = leader.stdout.readline().strip()
    command = [sys.executable, "-m", "tests.pipeline.following_process", str(tmp_path), "1", "2", port]
    follower = subprocess.Popen(command, cwd=ROOT)
    try:
        assert leader.stdout.readline() == "idle\n"
        leader.kill()
        assert follower.wait(30) != 0
    finally:
        for process in (leader, follower):
            process.kill()
            process.wait()
        leader.stdout.close()


def test_heads_that_cannot_be_shared_alike_are_refused() -> None:
    with pytest.raises(ModelError, match=r"4 heads with 2 keys.* 3 processes.* one of \[1, 2\]"):
        check_shares(ARCHITECTURES["llama"], 3)
    check_shares(ARCHITECTURES["llama"], 2)


def test_kv_memory_is_that_of_all_processes(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    options = EngineOptions(num_slots=1, kv_memory=20_000, max_context=512)
    method = method_named("plain", ())
    with pytest.raises(ConfigError) as whole:
        build_engine(tiny_model("llama"), NoText(), method, options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as parts, shared(tmp_path, 2) as share:
        build_engine(share.model, NoText(), method, options, ranks=share.ranks)  # type: ignore[arg-type]
    assert str(parts.value) == str(whole.value)
