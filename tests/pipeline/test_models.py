"""Whatever a user may write after `--model` loads as it should, or fails with one line that says what to do."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    BartConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from pipeline.embedded import EMBEDDED
from pipeline.errors import ModelError
from pipeline.models import (
    ResolvedModel,
    load_causal_lm,
    load_config,
    load_tokenizer,
    main,
    resolve_model,
    tokenizer_hash,
)

TOKENS = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
NUM_KV_HEADS = 2
CONFIG = LlamaConfig(
    vocab_size=len(TOKENS),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=NUM_KV_HEADS,
    max_position_embeddings=128,
    tie_word_embeddings=False,
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(TOKENS)}, merges=[("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama with a byte tokenizer, as save_pretrained writes it. Not to be changed: copy it."""
    directory = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    LlamaForCausalLM(CONFIG).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(torch.tensor([[5, 70, 33, 12]])).logits
    return found


# The embedded model


def test_the_embedded_model_answers_and_ends_its_turn(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    model.set_attn_implementation("sdpa")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompt, max_new_tokens=32, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(output[prompt["input_ids"].shape[1] :])
    assert output[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_the_embedded_model_carries_its_end_of_turn_token_and_chat_template() -> None:
    resolved = resolve_model("smollm2-135m")
    assert GenerationConfig.from_pretrained(resolved.path).eos_token_id == [2]
    tokenizer = load_tokenizer(resolved)
    assert tokenizer.convert_ids_to_tokens([2]) == ["<|im_end|>"]
    assert tokenizer.chat_template
    assert tokenizer.decode(tokenizer("Year 2024,\n\n  naïve 漢字 🙂")["input_ids"]) == "Year 2024,\n\n  naïve 漢字 🙂"
    assert (resolved.revision, resolved.hash) == (None, EMBEDDED["smollm2-135m"].sha256)


def test_the_embedded_weights_are_the_dequantised_ones_and_fp32_is_the_smallest_type_for_them() -> None:
    with safe_open(Path(resolve_model("smollm2-135m").path) / "model.safetensors", framework="pt") as file:
        weights = file.get_tensor("model.layers.7.mlp.up_proj.weight")
        embeddings = file.get_tensor("model.embed_tokens.weight")
    # Q4_1: 32 values share a scale and an offset, so they take at most 16 values, evenly spaced; fp32 rounds each once.
    blocks = weights.view(-1, 32).sort(dim=1).values.double()
    steps = blocks.diff(dim=1)
    scale = steps.where(steps > 1e-9, torch.inf).amin(dim=1, keepdim=True)
    multiples = (blocks - blocks[:, :1]) / scale
    assert multiples.max() < 15.01
    assert (multiples - multiples.round()).abs().max() < 1e-2
    for dtype in (torch.float16, torch.bfloat16):
        assert (embeddings.to(dtype).float() != embeddings).float().mean() > 0.5


def test_fetch_checks_the_embedded_model(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        main(["fetch", "smollm2-135m"])
    assert str(EMBEDDED["smollm2-135m"].directory) in caplog.text


# Local files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_directory_loads_in_eval_mode_without_gradients(tiny: Path, dtype: torch.dtype) -> None:
    model = load_causal_lm(resolve_model(str(tiny)), dtype, "cpu")
    assert not model.training
    assert {(weight.dtype, weight.requires_grad) for weight in model.parameters()} == {(dtype, False)}
    expected = LlamaForCausalLM.from_pretrained(tiny, dtype=dtype)
    assert torch.equal(logits(model), logits(expected))


def test_auto_dtype_is_the_checkpoints(copy: Path) -> None:
    LlamaForCausalLM.from_pretrained(copy, dtype=torch.bfloat16).save_pretrained(copy)
    assert load_causal_lm(resolve_model(str(copy)), "auto", "cpu").dtype == torch.bfloat16


def test_a_relative_path_works_from_any_directory(tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tiny.parent)
    resolved = resolve_model(tiny.name)
    monkeypatch.chdir(tmp_path)
    assert load_config(resolved).vocab_size == len(TOKENS)


def test_the_hash_is_that_of_the_content(tiny: Path, copy: Path) -> None:
    before = resolve_model(str(copy)).hash
    assert before == resolve_model(str(tiny)).hash
    (copy / "README.md").write_text("not part of the model")
    assert before == resolve_model(str(copy)).hash
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert before != resolve_model(str(copy)).hash


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    """The tiny Llama as llama.cpp's converter would write it, unquantised."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(NUM_KV_HEADS)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_vocab_size(CONFIG.vocab_size)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, CONFIG.num_hidden_layers)
    heads = {"q_proj": CONFIG.num_attention_heads, "k_proj": NUM_KV_HEADS}
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if (part := name.split(".")[-2]) in heads:  # llama.cpp interleaves the halves that rotary embedding pairs
            values = values.reshape(heads[part], 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        stored = names.get_name(name, (".weight",))
        assert stored is not None
        writer.add_tensor(stored, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_gives_the_same_model_and_tokenizer(tiny: Path, tmp_path: Path) -> None:
    expected = LlamaForCausalLM.from_pretrained(tiny)
    write_gguf(tmp_path / "tiny.gguf", expected)
    resolved = resolve_model(str(tmp_path / "tiny.gguf"))
    model = load_causal_lm(resolved, torch.float32, "cpu")
    torch.testing.assert_close(logits(model), logits(expected))
    tokenizer = load_tokenizer(resolved)
    assert tokenizer.decode(tokenizer("some thin text")["input_ids"]) == "some thin text"


# What cannot be loaded


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("./no-such-model", "existing directory"),
        ("/no/such/model", "existing directory"),
        ("missing.gguf", "existing directory"),
        ("smollm-135m", "did you mean 'smollm2-135m'"),
        ("owner/no-such-model", "hub id"),
        ("two words", "hub id"),
        ("", "hub id"),
        ("~nobody/model", "existing directory"),
        ("long/" * 1000, "existing directory"),
        ("nul\0", "hub id"),
    ],
)
def test_an_unknown_name_is_repeated_with_a_remedy(name: str, remedy: str) -> None:
    with pytest.raises(ModelError) as raised:
        resolve_model(name)
    assert repr(name) in str(raised.value)
    assert remedy in str(raised.value)


def test_a_revision_is_for_hub_models_only(tiny: Path) -> None:
    for name in (str(tiny), "smollm2-135m"):
        with pytest.raises(ModelError, match="drop the revision"):
            resolve_model(name, revision="main")


def test_a_directory_without_a_model_says_what_is_missing(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no \\*\\.safetensors"):
        resolve_model(str(copy))
    (copy / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_model(str(copy))
    with pytest.raises(ModelError, match="is a file"):
        resolve_model(str(copy / "tokenizer.json"))


def load_all(resolved: ResolvedModel) -> None:
    load_tokenizer(resolved)
    load_causal_lm(resolved, torch.float32, "cpu")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("length", [0, 100])
def test_a_cut_file_is_a_model_error(copy: Path, name: str, length: int) -> None:
    path = copy / name
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ModelError, match="copy"):
        load_all(resolve_model(str(copy)))


def test_missing_weights_are_an_error_not_random_numbers(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 weights .* 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        load_all(resolve_model(str(copy)))


def test_an_encoder_decoder_is_refused(copy: Path) -> None:
    BartConfig().save_pretrained(copy)
    with pytest.raises(ModelError, match=r"\(bart\) has an encoder"):
        load_config(resolve_model(str(copy)))


def test_an_unknown_architecture_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "not-known-yet"}))
    with pytest.raises(ModelError, match="knows the architecture"):
        load_config(resolve_model(str(copy)))


def test_a_models_own_code_runs_only_when_allowed(copy: Path) -> None:
    (copy / "custom.py").write_text("from transformers import LlamaConfig\nclass Custom(LlamaConfig):\n    pass\n")
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "custom", "auto_map": {"AutoConfig": "custom.Custom"}}
    (copy / "config.json").write_text(json.dumps(config))
    resolved = resolve_model(str(copy))
    with pytest.raises(ModelError, match="--trust-remote-code"):
        load_config(resolved)
    assert type(load_config(resolved, trust_remote_code=True)).__name__ == "Custom"


# Tokenizer identity


def test_the_tokenizer_hash_is_that_of_vocabulary_and_special_tokens(tiny: Path) -> None:
    tokenizer = load_tokenizer(resolve_model(str(tiny)))
    assert tokenizer_hash(tokenizer) == tokenizer_hash(byte_tokenizer())
    tokenizer.chat_template = "{{ messages }}"
    assert tokenizer_hash(tokenizer) == tokenizer_hash(byte_tokenizer())
    tokenizer.add_tokens(["<tool>"])
    with_token = tokenizer_hash(tokenizer)
    assert with_token != tokenizer_hash(byte_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    assert tokenizer_hash(tokenizer) != with_token


def test_the_configuration_is_read_without_the_weights(tiny: Path) -> None:
    assert load_config(resolve_model(str(tiny))).to_dict() == AutoConfig.from_pretrained(tiny).to_dict()
