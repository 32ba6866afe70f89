"""A small Llama's own answers to many prompts at once, for training on one GPU: hundreds of thousands in minutes.

Static shapes and one captured CUDA graph a step and cache length; without CUDA the same code runs step by step. Fast
only in bulk and never exact to the bit: outputs that have to be the target's own come from `rasd generate`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, LlamaForCausalLM

from pipeline.training.data import Example

_LENGTH_STEP = 64  # cache lengths that have a graph of their own are multiples of this
_PREFILL_TOKENS = 1 << 15
_CHECK_EVERY = 16
_KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # those that take a mask and need no plan of their own
_FEW = 0.2  # of a batch's answers are cut when no more than so many are unfinished: their rows would idle the rest


@dataclass(frozen=True, slots=True)
class _Layer:
    """Weights of one decoder layer, products that share their input side by side."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    mix: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class AnswerSampler:
    """Samples answers, `len(temperatures)` to each prompt.

    Args:
        model: on its device, in the dtype to compute in.
        num_prompts: of a batch.
        temperatures: of the answers to one prompt; 0 is greedy.
        max_prompt: longest prompt, in tokens; max_new: longest answer.
        eos_ids: tokens that end an answer.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        num_prompts: int,
        temperatures: Sequence[float],
        max_prompt: int,
        max_new: int,
        eos_ids: Sequence[int],
    ) -> None:
        config = model.config
        self._model = model
        self._device = model.device
        self._max_new = max_new
        self._num_samples = len(temperatures)
        self._heads, self._kv = config.num_attention_heads, config.num_key_value_heads
        self._size = model.model.layers[0].self_attn.head_dim
        self._layers = [_weights(layer) for layer in model.model.layers]
        rows = num_prompts * self._num_samples
        length = -(-(max_prompt + max_new) // _LENGTH_STEP) * _LENGTH_STEP
        cache = (len(self._layers), 2, rows, self._kv, length, self._size)
        self._cache = torch.zeros(cache, dtype=model.dtype, device=self._device)
        self._tokens = torch.zeros(rows, length, dtype=torch.int64, device=self._device)
        self._padding = torch.zeros(rows, dtype=torch.int64, device=self._device)
        self._is_done = torch.zeros(rows, dtype=torch.bool, device=self._device)
        self._column = torch.zeros(1, dtype=torch.int64, device=self._device)  # of the newest token
        self._temperature = torch.tensor(temperatures, device=self._device).repeat(num_prompts)[:, None]
        self._eos = torch.tensor(list(eos_ids), device=self._device)
        self._graphs: dict[int, Callable[[], None]] = {}

    @torch.inference_mode()
    def answers(self, prompts: Sequence[np.ndarray]) -> list[Example]:
        """Prompts with their answers, the answers to one prompt side by side.

        Args:
            prompts: as many as a batch has, each [L] of token ids, of like lengths.
        """
        width = max(len(prompt) for prompt in prompts)
        self._prefill(prompts, width)
        made = 0
        for made in range(1, self._max_new):
            self._step_at(width + made)
            if made % _CHECK_EVERY == 0 and float((~self._is_done).float().mean()) <= _FEW:
                break
        tokens = self._tokens[:, : width + made + 1].cpu().numpy()
        padding = self._padding.cpu().numpy()
        eos = self._eos.cpu().numpy()
        examples = []
        for row, pad in zip(tokens, padding, strict=True):
            ends = np.isin(row[width:], eos).nonzero()[0]
            count = int(ends[0]) + 1 if len(ends) else len(row) - width
            examples.append(Example(row[pad : width + count].astype(np.int32), width - int(pad)))
        return examples

    def _prefill(self, prompts: Sequence[np.ndarray], width: int) -> None:
        """Keys and values of the prompts, which end in column `width` - 1, and the first token of each answer."""
        self._is_done.zero_()
        at_once = max(_PREFILL_TOKENS // width, 1)
        logits = []
        for begin in range(0, len(prompts), at_once):
            some = prompts[begin : begin + at_once]
            padding = torch.tensor([width - len(prompt) for prompt in some], device=self._device)
            ids = np.stack([np.pad(prompt.astype(np.int64), (width - len(prompt), 0)) for prompt in some])
            token_ids = torch.from_numpy(ids).to(self._device)
            places = torch.arange(width, device=self._device)
            cache = DynamicCache(config=self._model.config)
            output = self._model(
                input_ids=token_ids,
                attention_mask=(places >= padding[:, None]).long(),
                position_ids=(places - padding[:, None]).clamp(min=0),
                past_key_values=cache,
                logits_to_keep=1,
            )
            rows = slice(begin * self._num_samples, (begin + len(some)) * self._num_samples)
            for number, layer in enumerate(cache.layers):
                for kind, states in enumerate((layer.keys, layer.values)):
                    # What is computed of padding may be no number, and no number times 0 is none either.
                    states = torch.where((places >= padding[:, None])[:, None, :, None], states, 0.0)
                    self._cache[number, kind, rows, :, :width] = states.repeat_interleave(self._num_samples, dim=0)
            self._tokens[rows, :width] = token_ids.repeat_interleave(self._num_samples, dim=0)
            self._padding[rows] = padding.repeat_interleave(self._num_samples)
            logits.append(output.logits[:, -1].repeat_interleave(self._num_samples, dim=0))
        self._column.fill_(width - 1)
        self._choose(torch.cat(logits))

    def _step_at(self, length: int) -> None:
        """One more token of every answer; `length` tokens are in the cache then."""
        bucket = -(-length // _LENGTH_STEP) * _LENGTH_STEP
        if bucket not in self._graphs:
            self._graphs[bucket] = self._captured(bucket)
        self._graphs[bucket]()

    def _captured(self, length: int) -> Callable[[], None]:
        if self._device.type != "cuda":
            return lambda: self._step(length)
        kept = [tensor.clone() for tensor in (self._tokens, self._is_done, self._column)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries allocate in the first passes, which a graph must not
            self._step(length)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step(length)
        for tensor, before in zip((self._tokens, self._is_done, self._column), kept, strict=True):
            tensor.copy_(before)
        return graph.replay

    def _step(self, length: int) -> None:
        """The newest token of each answer through the model, and the choice of the next."""
        embedding, eps = self._model.model.embed_tokens.weight, self._model.config.rms_norm_eps
        places = torch.arange(length, device=self._device)
        seen = (places >= self._padding[:, None]) & (places <= self._column)
        mask = torch.zeros(seen.shape, dtype=embedding.dtype, device=self._device).masked_fill_(~seen, -torch.inf)
        mask = mask[:, None, None].expand(-1, self._kv, self._heads // self._kv, -1)
        tokens = self._tokens.index_select(1, self._column)[:, 0]
        hidden = embedding[tokens]
        cos, sin = self._model.model.rotary_emb(hidden, (self._column - self._padding)[None])
        cos, sin = cos[0][:, None], sin[0][:, None].clone()
        sin[..., : self._size // 2].neg_()  # for halves that are swapped, not turned
        turned = self._heads + self._kv
        for layer, (keys, values) in zip(self._layers, self._cache, strict=True):
            normed = F.rms_norm(hidden, hidden.shape[-1:], layer.input_norm, eps)
            states = (normed @ layer.qkv.T).unflatten(-1, (-1, self._size))
            plain = states[:, :turned]
            swapped = plain.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
            rotated = torch.addcmul(plain * cos, swapped, sin)
            keys.index_copy_(2, self._column, rotated[:, self._heads :, None])
            values.index_copy_(2, self._column, states[:, turned:, None])
            # The query heads that share a key head stand where queries of several tokens would: nothing is repeated.
            query = rotated[:, : self._heads].unflatten(1, (self._kv, -1))
            with sdpa_kernel(_KERNELS):
                attended = F.scaled_dot_product_attention(query, keys[:, :, :length], values[:, :, :length], mask)
            hidden = torch.addmm(hidden, attended.flatten(1), layer.mix.T)
            normed = F.rms_norm(hidden, hidden.shape[-1:], layer.mlp_norm, eps)
            gate, up = (normed @ layer.gate_up.T).chunk(2, dim=-1)
            hidden = torch.addmm(hidden, F.silu(gate) * up, layer.down.T)
        hidden = F.rms_norm(hidden, hidden.shape[-1:], self._model.model.norm.weight, eps)
        self._choose(hidden @ self._model.lm_head.weight.T)

    def _choose(self, logits: torch.Tensor) -> None:
        """Appends a token to each answer; Gumbel noise times the temperature decides (Gumbel-max)."""
        noise = torch.empty(logits.shape, dtype=torch.float32, device=self._device).exponential_().log_()
        chosen = torch.addcmul(logits.float(), noise, self._temperature, value=-1.0).argmax(-1)
        chosen = torch.where(self._is_done, self._eos[0], chosen)
        self._is_done |= (chosen[:, None] == self._eos).any(-1)
        self._column += 1
        self._tokens.index_copy_(1, self._column, chosen[:, None])


def batches(prompts: Sequence[np.ndarray], size: int, seed: int) -> Iterator[list[np.ndarray]]:
    """Whole batches of prompts of like length, in random order."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for number in np.random.default_rng(seed).permutation(len(order) // size):
        yield [prompts[i] for i in order[number * size : (number + 1) * size]]


def _weights(layer: torch.nn.Module) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    qkv = [part.weight.detach() for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
    gate_up = [part.weight.detach() for part in (mlp.gate_proj, mlp.up_proj)]
    return _Layer(
        layer.input_layernorm.weight.detach(),
        torch.cat(qkv),
        attention.o_proj.weight.detach(),
        layer.post_attention_layernorm.weight.detach(),
        torch.cat(gate_up),
        mlp.down_proj.weight.detach(),
    )
