"""What the driver must know of the tokenizer and the embedder before any work, by names that mean the same anywhere."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from datastore.embedder import Embedder
from datastore.format import DenseSpec, token_dtype
from jobs.datastore_config import BuildConfig, CorpusConfig
from jobs.segments.chunks import SegmentSpec
from jobs.segments.task import Recipe
from pipeline.embedded import EMBEDDED
from pipeline.errors import DatastoreError
from pipeline.models import ResolvedModel, load_config, load_tokenizer, resolve_model, tokenizer_hash


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A model's tokenizer.

    Attributes:
        model: its name on any node.
        revision: the hub commit; None for local models.
        size: ids are below it: the tokenizer's, or the model's output if that is larger.
    """

    model: str
    revision: str | None
    tokenizer: PreTrainedTokenizerBase
    hash: str
    size: int


def load_vocabulary(config: CorpusConfig) -> Vocabulary:
    """Find `--model` and load its tokenizer.

    Raises:
        ModelError: there is no such model, or it cannot be loaded.
        DatastoreError: its vocabulary is too large for a datastore.
    """
    resolved = resolve_model(config.model, config.revision)
    tokenizer = load_tokenizer(resolved, trust_remote_code=config.trust_remote_code)
    model = load_config(resolved, trust_remote_code=config.trust_remote_code)
    size = max(len(tokenizer), int(model.get_text_config().vocab_size))
    token_dtype(size)  # raises before any work
    return Vocabulary(_anywhere(resolved), resolved.revision, tokenizer, tokenizer_hash(tokenizer), size)


def dense_spec(config: BuildConfig) -> DenseSpec | None:
    """How passages are to be made, the embedder loaded once to see that it can be; None with `--dense off`.

    Raises:
        ModelError: there is no such embedder, or it cannot be loaded.
    """
    if config.dense == "off":
        return None
    name = _absolute(config.embedder)
    embedder = Embedder.load(name, device="cpu")
    return DenseSpec(name, embedder.hash, embedder.dimension, config.passage_tokens, config.overlap)


def check_embedder(spec: DenseSpec, name: str) -> str:
    """The name under which a datastore's embedder is to be loaded.

    Raises:
        ModelError: it cannot be loaded.
        DatastoreError: it is another one.
    """
    found = Embedder.load(_absolute(name), device="cpu").hash
    if found != spec.embedder_hash:
        raise DatastoreError(
            f"the embedder {name!r} has the hash {found}, that of the datastore's ({spec.embedder}) is"
            f" {spec.embedder_hash}. Name the same one with --embedder."
        )
    return _absolute(name)


def recipe_of(config: CorpusConfig, vocabulary: Vocabulary, spec: SegmentSpec, embedder: str | None) -> Recipe:
    """What tasks need to know; threads and device follow from the cluster."""
    return Recipe(spec, vocabulary.model, vocabulary.revision, config.trust_remote_code, embedder)


def _anywhere(resolved: ResolvedModel) -> str:
    if resolved.name in EMBEDDED or resolved.revision is not None:
        return resolved.name
    return str(Path(resolved.path, resolved.gguf_file or ""))


def _absolute(embedder: str) -> str:
    path = Path(embedder).expanduser()
    return str(path.absolute()) if path.exists() else embedder
