"""An embedder gives what its encoder and pooling define, whatever the batch, and names what it cannot load."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, RobertaConfig, RobertaModel

from datastore.embed_files import find_encoder
from datastore.embedder import DEFAULT_EMBEDDER, Embedder
from pipeline.errors import ModelError

TEXTS = [
    "What are the symptoms of pneumonia?",
    "",
    "def reverse(items):\n    return items[::-1]",
    "Aspirin lowers fever and thins the blood. " * 60,  # beyond the 256 tokens of MiniLM
    "Fever",
    "日本語の文章と emoji 🙂",
]
SMALL = {
    "vocab_size": 30522,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def minilm() -> Embedder:
    return Embedder.load(DEFAULT_EMBEDDER, device="cpu")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """MiniLM's directory, free to change."""
    return Path(shutil.copytree(find_encoder(DEFAULT_EMBEDDER).directory, tmp_path / "copy"))


def small(directory: Path, architecture: str = "bert", **changes: int) -> Path:
    """A tiny encoder with random weights and MiniLM's tokenizer, as transformers saves it."""
    torch.manual_seed(0)
    settings = {**SMALL, **changes}
    model = RobertaModel(RobertaConfig(**settings)) if architecture == "roberta" else BertModel(BertConfig(**settings))
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(find_encoder(DEFAULT_EMBEDDER).directory).save_pretrained(directory)
    return directory


def reference(directory: Path, texts: Sequence[str], max_tokens: int, is_cls: bool = False) -> np.ndarray:
    """Vectors in fp32, one text at a time and so without padding."""
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModel.from_pretrained(directory)
    vectors = []
    for text in texts:
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=max_tokens))[0][0]
        vectors.append((hidden[0] if is_cls else hidden.mean(0)).numpy())
    return np.stack([vector / np.linalg.norm(vector) for vector in vectors])


def assert_close(vectors: np.ndarray, expected: np.ndarray) -> None:
    assert vectors.shape == expected.shape
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert (vectors * expected).sum(1).min() > 0.999  # bf16 where the CPU has it


def test_equals_the_encoder_one_text_at_a_time(minilm: Embedder) -> None:
    vectors = minilm.encode(TEXTS)
    assert vectors.dtype == np.float32 and vectors.shape == (len(TEXTS), minilm.dimension) == (6, 384)
    assert minilm.max_tokens == 256
    assert_close(vectors, reference(find_encoder(DEFAULT_EMBEDDER).directory, TEXTS, 256))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_batch_changes_nothing(batch_size: int, minilm: Embedder) -> None:
    assert_close(minilm.encode(TEXTS, batch_size), minilm.encode(TEXTS))


def test_no_texts(minilm: Embedder) -> None:
    assert minilm.encode([]).shape == (0, 384)


def test_the_nearest_text_is_about_the_same(minilm: Embedder) -> None:
    answers = ["Drink water, rest, and take paracetamol.", "Use a list comprehension.", "The capital is Paris."]
    questions = ["Which city governs France?", "How do I bring down a fever?", "How to filter a Python list?"]
    assert (minilm.encode(questions) @ minilm.encode(answers).T).argmax(1).tolist() == [2, 0, 1]


def test_threads_are_those_asked_for_and_given_back(minilm: Embedder) -> None:
    before = torch.get_num_threads()
    other = Embedder.load(DEFAULT_EMBEDDER, device="cpu", num_threads=before + 1)
    seen: list[int] = []
    other._model.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    other.encode(["one", "two"], batch_size=1)
    assert seen == [before + 1] * 2
    assert torch.get_num_threads() == before


def test_a_copy_is_the_same_encoder_until_a_file_changes(minilm: Embedder, copy: Path) -> None:
    (copy / "notes.md").write_text("not part of the model")
    assert Embedder.load(str(copy)).hash == minilm.hash
    hashes = {minilm.hash}
    weights = load_file(copy / "model.safetensors")
    weights["embeddings.word_embeddings.weight"] += 0.01
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    hashes.add(Embedder.load(str(copy)).hash)
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + " ")
    hashes.add(Embedder.load(str(copy)).hash)
    (copy / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    hashes.add(Embedder.load(str(copy)).hash)
    assert len(hashes) == 4


@pytest.mark.parametrize(
    "config", [{"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, {"pooling_mode": "cls"}]
)
def test_pooling_by_the_first_token(config: dict[str, object], copy: Path) -> None:
    (copy / "1_Pooling" / "config.json").write_text(json.dumps(config))
    assert_close(Embedder.load(str(copy)).encode(TEXTS), reference(copy, TEXTS, 256, is_cls=True))


@pytest.mark.parametrize(("architecture", "max_tokens"), [("bert", 40), ("roberta", 39)])
def test_another_encoder_pools_by_mean_and_keeps_to_its_positions(
    architecture: str, max_tokens: int, tmp_path: Path
) -> None:
    """RoBERTa numbers positions from behind the padding's index: a text of all 40 would be out of range."""
    embedder = Embedder.load(str(small(tmp_path, architecture, max_position_embeddings=40)))
    assert (embedder.max_tokens, embedder.dimension) == (max_tokens, 32)
    assert_close(embedder.encode(TEXTS), reference(tmp_path, TEXTS, max_tokens))


def test_a_hub_id_is_found_in_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "models--someone--tiny"
    small(repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    embedder = Embedder.load("someone/tiny")
    assert embedder.name == "someone/tiny"
    assert embedder.hash == find_encoder(str(repository / "snapshots" / ("a" * 40))).hash
    with pytest.raises(ModelError, match=r"'someone/other' is neither a local directory nor .* Give an existing"):
        Embedder.load("someone/other")


@pytest.mark.parametrize("name", ["./nowhere", "not a name", "x" * 5000])
def test_a_name_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=rf"neither a local directory.*{DEFAULT_EMBEDDER}"):
        Embedder.load(name)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no directory with a config\.json"):
        Embedder.load(str(tmp_path))


def test_layers_that_would_change_the_vectors_are_refused(copy: Path) -> None:
    layers = json.loads((copy / "modules.json").read_text())
    layers.append({"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"})
    (copy / "modules.json").write_text(json.dumps(layers))
    with pytest.raises(ModelError, match="has a Dense layer, which is not supported"):
        Embedder.load(str(copy))


@pytest.mark.parametrize(
    ("config", "modes"),
    [
        ({"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens"),
        ({"pooling_mode": "lasttoken"}, "lasttoken"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "cls, mean"),
    ],
)
def test_other_pooling_is_refused(config: dict[str, object], modes: str, copy: Path) -> None:
    (copy / "1_Pooling" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"pools by {modes}; supported are mean and cls"):
        Embedder.load(str(copy))


def test_damaged_files_are_refused(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"cannot be loaded: .* Check that its files are complete"):
        Embedder.load(str(copy))
    del weights["encoder.layer.3.output.dense.weight"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 weights, 'encoder\.layer\.3\.output\.dense\.weight' first"):
        Embedder.load(str(copy))
    (copy / "modules.json").write_text("{")
    with pytest.raises(ModelError, match=r"modules\.json cannot be read"):
        Embedder.load(str(copy))


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ModelError, match="device 'nonsense' cannot be used"):
        Embedder.load(DEFAULT_EMBEDDER, device="nonsense")


@pytest.mark.gpu
def test_a_gpu_gives_the_same_vectors(minilm: Embedder) -> None:
    assert_close(Embedder.load(DEFAULT_EMBEDDER, device="cuda").encode(TEXTS), minilm.encode(TEXTS))
