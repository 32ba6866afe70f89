"""Small real models with random weights, one an architecture, and drafters that make verification work hard."""

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from pipeline.pace import Pace
from pipeline.proposal import Draft, SlotView
from pipeline.tree import EMPTY_TREE, TokenTree

VOCABULARY = 128
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.4,  # spreads the logits, so that few choices are within rounding
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}

ARCHITECTURES: Mapping[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_GROUPED),
    "qwen2": Qwen2Config(**_GROUPED),
    "qwen3": Qwen3Config(**_GROUPED, head_dim=16),
    "mistral": MistralConfig(**_GROUPED, sliding_window=12),
    "gemma2": Gemma2Config(**_GEMMA, layer_types=["sliding_attention", "full_attention"] * 2),
    "gemma3": Gemma3TextConfig(**_GEMMA, layer_types=["sliding_attention"] * 3 + ["full_attention"]),
    "phi": PhiConfig(**_SIZES),
    "phi3": Phi3Config(**_GROUPED),
}


def tiny_model(architecture: str, seed: int = 0) -> PreTrainedModel:
    """A randomly initialised model in eval mode; the same seed gives the same weights."""
    torch.manual_seed(seed)
    config = copy.deepcopy(ARCHITECTURES[architecture])  # a target changes its model's attention in place
    model: PreTrainedModel = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    return model


class OracleDrafter:
    """Proposes trees that mix the true continuation, up to a random depth, with wrong siblings and wrong branches.

    Args:
        outputs: for each prompt (as a tuple of ids) the reference output.
        seed: of the random trees.
        max_nodes: size of the largest tree.
    """

    def __init__(self, outputs: Mapping[tuple[int, ...], Sequence[int]], seed: int = 0, max_nodes: int = 24) -> None:
        self._texts = [(prompt, (*prompt, *output)) for prompt, output in outputs.items()]
        self._random = np.random.default_rng(seed)
        self._max_nodes = max_nodes

    def draft(self, views: Sequence[SlotView], pace: Pace) -> Draft:
        return Draft([self._tree(view) for view in views])

    def release(self, slot: int) -> None:
        """It keeps nothing."""

    def _tree(self, view: SlotView) -> TokenTree:
        if view.max_depth < 1:
            return EMPTY_TREE
        known = tuple(view.tokens.tolist())
        future = next((text[len(known) :] for _, text in self._texts if text[: len(known)] == known), ())
        tokens: list[int] = []
        parents: list[int] = []
        true_end = -1
        for true_token in (*future[: self._random.integers(0, 8)], -1):
            children = {int(token) for token in self._random.integers(3, VOCABULARY, self._random.integers(0, 4))}
            order = [token for token in children if token != true_token] + ([true_token] if true_token >= 0 else [])
            self._random.shuffle(order)
            parent = true_end
            for token in order:
                if token == true_token:
                    true_end = len(tokens)
                tokens.append(token)
                parents.append(parent)
        while len(tokens) < self._random.integers(0, self._max_nodes) and tokens:
            parent = int(self._random.integers(0, len(tokens)))
            siblings = {tokens[i] for i, p in enumerate(parents) if p == parent}
            token = int(self._random.integers(3, VOCABULARY))
            if token not in siblings:
                tokens.append(token)
                parents.append(parent)
        return TokenTree.of(tokens, parents, "draft")
