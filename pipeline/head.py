"""The draft head: one decoder layer over the target's own hidden states, after EAGLE-3 (Li et al., arXiv 2503.01840).

Place j of a sequence joins the token at j with the target's features at j - 1 and predicts the token at j + 1. Beyond
the known tokens the features are the head's own output at the place before. Features are hidden states from three
depths of the target, each normalised (some models have single activations a hundred times the rest), fused to one.
The output matrix is the target's own, cut to a draft vocabulary, with a low-rank correction; neither it nor the
embedding is stored with the head.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

NUM_DEPTHS = 3


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """Shape of a head, and the target it belongs to.

    Attributes:
        target: hash of the target, see `pipeline.models.ResolvedModel.hash`.
        depths: the decoder layers of the target whose outputs are read.
        hidden_size: H of the target and of the head.
        num_heads, num_kv_heads, head_dim, intermediate_size: of the head's layer.
        rope_theta: base of its rotary positions.
        vocab_size: V of the target.
        draft_vocab_size: tokens that the head can propose.
        rank: of the output's correction; 0 for none.
    """

    target: str
    depths: tuple[int, int, int]
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float
    vocab_size: int
    draft_vocab_size: int
    rank: int

    @staticmethod
    def for_target(model: PreTrainedModel, target: str, draft_vocab_size: int, rank: int) -> "HeadConfig":
        """A layer like one of the target's own."""
        config: Any = model.config.get_text_config()
        layers = int(config.num_hidden_layers)
        rope = getattr(config, "rope_parameters", None) or {}
        return HeadConfig(
            target=target,
            depths=(min(2, layers - 1), layers // 2, layers - 1),
            hidden_size=int(config.hidden_size),
            num_heads=int(config.num_attention_heads),
            num_kv_heads=int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads),
            head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads),
            intermediate_size=int(config.intermediate_size),
            rope_theta=float(rope.get("rope_theta", 10_000.0)),
            vocab_size=int(config.vocab_size),
            draft_vocab_size=min(draft_vocab_size, int(config.vocab_size)),
            rank=rank,
        )

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file; `HeadConfig(**value)` reads it back, with `depths` made a tuple."""
        return asdict(self)


class DraftHead(nn.Module):
    """The head's weights and its mathematics; attention itself is the caller's, who knows where keys and values lie.

    Args:
        embedding: [V, H] of the target; shared, not stored.
        output: [V, H] of the target; its rows `token_ids` are copied, not stored.
        token_ids: [draft_vocab_size] int64, ascending: the target's id of each draft token.
        scale: [H] weight of the target's norm before its output, what the head's own starts from; ones if None.
    """

    token_ids: torch.Tensor
    output: torch.Tensor

    def __init__(
        self,
        config: HeadConfig,
        embedding: torch.Tensor,
        output: torch.Tensor,
        token_ids: torch.Tensor,
        scale: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        hidden, heads, kv = (
            config.hidden_size,
            config.num_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
        )
        self.state_norms = nn.ModuleList(nn.RMSNorm(hidden, eps=1e-5) for _ in range(NUM_DEPTHS))
        self.fuse = nn.Linear(NUM_DEPTHS * hidden, hidden, bias=False)
        self.token_norm = nn.RMSNorm(hidden, eps=1e-5)
        self.feature_norm = nn.RMSNorm(hidden, eps=1e-5)
        self.token = nn.Linear(hidden, hidden, bias=False)
        self.query = nn.Linear(2 * hidden, heads, bias=False)
        self.key = nn.Linear(2 * hidden, kv, bias=False)
        self.value = nn.Linear(2 * hidden, kv, bias=False)
        self.mix = nn.Linear(heads, hidden, bias=False)
        self.mlp_norm = nn.RMSNorm(hidden, eps=1e-5)
        self.gate = nn.Linear(hidden, config.intermediate_size, bias=False)
        self.up = nn.Linear(hidden, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, hidden, bias=False)
        self.output_norm = nn.RMSNorm(hidden, eps=1e-5)
        self.narrow = nn.Linear(hidden, config.rank, bias=False) if config.rank else None
        self.widen = nn.Linear(config.rank, config.draft_vocab_size, bias=False) if config.rank else None
        self._embedding = embedding  # a plain tensor: not a parameter, not in the state
        self.register_buffer("token_ids", token_ids)
        self.register_buffer("output", output[token_ids].clone(), persistent=False)
        self._initialise(scale)

    def _initialise(self, scale: torch.Tensor | None) -> None:
        """So that the untrained head repeats what its deepest features say."""
        hidden = self.config.hidden_size
        with torch.no_grad():
            self.fuse.weight.zero_()
            self.fuse.weight[:, (NUM_DEPTHS - 1) * hidden :] = torch.eye(hidden)
            self.token.weight.zero_()
            for layer in (self.mix, self.down):
                layer.weight.mul_(0.1)
            if self.widen is not None:
                self.widen.weight.zero_()
            if scale is not None:
                self.output_norm.weight.copy_(scale)

    def features(self, states: torch.Tensor) -> torch.Tensor:
        """The target's hidden states at three depths, [..., 3 H], as one feature [..., H]."""
        parts = zip(self.state_norms, states.chunk(NUM_DEPTHS, dim=-1), strict=True)
        fused: torch.Tensor = self.fuse(torch.cat([norm(part) for norm, part in parts], dim=-1))
        return fused

    def inputs(self, token_ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """What the layer sees of tokens [...] int64 and the features [..., H] before them, [..., 2 H]."""
        embedded = F.embedding(token_ids, self._embedding).to(features.dtype)
        return torch.cat([self.token_norm(embedded), self.feature_norm(features)], dim=-1)

    def heads(self, inputs: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query [..., heads, D], key and value [..., K, D] of inputs [..., 2 H] at positions [...]."""
        key, value = self.entries(inputs, positions)
        query = self.query(inputs).unflatten(-1, (-1, self.config.head_dim))
        return self._turned(query, positions), key, value

    def entries(self, inputs: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value, [..., K, D] each, of inputs [..., 2 H] at positions [...]."""
        size = self.config.head_dim
        key = self.key(inputs).unflatten(-1, (-1, size))
        return self._turned(key, positions), self.value(inputs).unflatten(-1, (-1, size))

    def _turned(self, states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return _rotated(states, *rotary(positions, self.config.head_dim, self.config.rope_theta))

    def residual(self, inputs: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """What the layer adds to, [..., H]: the features before a token, and the token itself.

        EAGLE-3 has the features alone; there the token has to come through attention to its own place.
        """
        residual: torch.Tensor = features + self.token(inputs[..., : self.config.hidden_size])
        return residual

    def close(self, residual: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The layer's output [..., H] from its residual and its attention's output [..., heads * D]."""
        hidden = residual + self.mix(attended)
        normed = self.mlp_norm(hidden)
        closed: torch.Tensor = hidden + self.down(F.silu(self.gate(normed)) * self.up(normed))
        return closed

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., draft_vocab_size] of outputs [..., H]."""
        normed = self.output_norm(hidden)
        logits: torch.Tensor = normed @ self.output.T.to(normed.dtype)
        if self.narrow is not None and self.widen is not None:
            logits = logits + self.widen(self.narrow(normed))
        return logits


def rotary(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [..., 1, D] of rotary position embeddings (Su et al., arXiv 2104.09864), halves convention."""
    steps = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None].float() * torch.exp(steps * (-math.log(theta) / head_dim))
    angles = torch.cat([angles, angles], dim=-1)[..., None, :]
    return angles.cos(), angles.sin()


def _rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = states.chunk(2, dim=-1)
    turned = torch.cat([-high, low], dim=-1)
    return (states * cos + turned * sin).to(states.dtype)
