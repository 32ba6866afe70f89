"""Texts to unit vectors, with any encoder of transformers; the only module of this package that knows torch.

Inner products of two vectors are cosines. Knows nothing of passages or indexes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from datastore.embed_files import DEFAULT_EMBEDDER, MAX_TOKENS, EncoderFiles, find_encoder
from pipeline.errors import ModelError

__all__ = ["DEFAULT_EMBEDDER", "Embedder"]

# What transformers raises for files that are missing, broken, too large for the device or of an unknown kind.
_LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, SafetensorError)


class Embedder:
    """An encoder with its tokenizer, ready to embed; made by `Embedder.load`.

    Attributes:
        name: as the user wrote it.
        hash: hex sha256 that changes with the weights, the tokenizer or the pooling.
        dimension: D, the length of a vector.
        max_tokens: longer texts are cut there.
    """

    def __init__(
        self,
        name: str,
        files: EncoderFiles,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        num_threads: int | None,
    ) -> None:
        self.name = name
        self.hash = files.hash
        self.dimension = int(model.config.hidden_size)
        self.max_tokens = min(files.max_tokens, int(tokenizer.model_max_length), _num_positions(model))
        self._pooling = files.pooling
        self._model = model
        self._tokenizer = tokenizer
        self._padding = int(tokenizer.pad_token_id or 0)
        self._num_threads = num_threads

    @classmethod
    def load(cls, name: str, *, device: str = "auto", num_threads: int | None = None) -> "Embedder":
        """Find and load an encoder; the default one is fetched first if need be.

        Args:
            name: `all-minilm-l6-v2`, a directory in the Hugging Face layout, or a hub id of an encoder.
            device: a torch device; `auto` takes a CUDA device where there is one.
            num_threads: CPU threads of `encode`; None leaves torch's number alone.

        Raises:
            ModelError: there is no such encoder, it cannot be loaded, or it pools in a way that is not supported.
        """
        files = find_encoder(name)
        place = _device(device)
        try:
            tokenizer = AutoTokenizer.from_pretrained(files.directory)
            with _without_bars():
                loaded = AutoModel.from_pretrained(
                    files.directory, dtype=_dtype(place), device_map={"": place}, output_loading_info=True
                )
        except _LOAD_ERRORS as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(
                f"The embedder {name!r} cannot be loaded: {reason} Check that its files are complete and that this "
                "version of transformers knows the architecture; code from the hub is not run for embedders."
            ) from error
        model, info = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
        # The pooler on top of some encoders is not used: files without one are complete.
        if missing := sorted(key for key in info["missing_keys"] if not key.startswith("pooler.")):
            raise ModelError(
                f"The files of the embedder {name!r} lack {len(missing)} weights, {missing[0]!r} first. "
                "Fetch them again, or name another encoder."
            )
        model.requires_grad_(False)
        return cls(name, files, model, tokenizer, num_threads)

    def encode(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        """Embed texts; one of any content, the empty one too, gives a vector of length 1.

        Args:
            texts: n of them; what lies beyond `max_tokens` of a text does not count.
            batch_size: texts of one forward pass. Texts of like lengths share one, so little is padding.

        Returns:
            [n, D] float32, rows in the order of `texts`.
        """
        vectors = np.empty((len(texts), self.dimension), np.float32)
        if not texts:
            return vectors
        encoded = self._tokenizer(list(texts), truncation=True, max_length=self.max_tokens, return_attention_mask=False)
        ids = [row or [self._padding] for row in cast(list[list[int]], encoded["input_ids"])]
        order = sorted(range(len(ids)), key=lambda row: -len(ids[row]))  # longest first: memory peaks at once
        with _threads(self._num_threads), torch.inference_mode():
            for begin in range(0, len(order), batch_size):
                rows = order[begin : begin + batch_size]
                vectors[rows] = self._forward([ids[row] for row in rows])
        return vectors

    def _forward(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """Vectors [B, D] of a batch; the first text is the longest, T tokens."""
        tokens = torch.full((len(ids), len(ids[0])), self._padding)  # [B, T] int64
        mask = torch.zeros_like(tokens)
        for row, text in enumerate(ids):
            tokens[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        tokens, mask = tokens.to(self._model.device), mask.to(self._model.device)
        hidden = self._model(input_ids=tokens, attention_mask=mask).last_hidden_state.float()  # [B, T, D]
        # The sum is the mean but for its length, which goes next.
        pooled = hidden[:, 0] if self._pooling == "cls" else (hidden * mask.unsqueeze(-1)).sum(1)
        return torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        reason = str(error).splitlines()[0]
        raise ModelError(f"The embedder's device {name!r} cannot be used: {reason} Give cpu, cuda or auto.") from error
    return device


def _dtype(device: torch.device) -> torch.dtype:
    """fp16 on a GPU; on a CPU bf16 if it multiplies that in hardware."""
    if device.type != "cpu":
        return torch.float16
    return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32


def _num_positions(model: PreTrainedModel) -> int:
    """How long a text the model has positions for; RoBERTa and its kin count from behind the padding's index."""
    positions = int(getattr(model.config, "max_position_embeddings", MAX_TOKENS))
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    reserved = getattr(table, "padding_idx", None)
    return positions if reserved is None else positions - int(reserved) - 1


@contextmanager
def _without_bars() -> Iterator[None]:
    """No progress bars of transformers: an embedder loads in an instant."""
    was_shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if was_shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """That many CPU threads of torch inside, as many as before outside."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
