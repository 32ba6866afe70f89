"""`rasd datastore query`: what a datastore says to token contexts or to texts, for people or as JSON."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from datastore import Datastore, Lookup
from pipeline.models import load_tokenizer, resolve_model, tokenizer_hash


def query(
    store: Path, contexts: Sequence[Sequence[int]], texts: Sequence[str], *, k: int, model: str | None, as_json: bool
) -> int:
    """Look up contexts, or search passages for texts, and print what is found.

    Args:
        k: passages a text.
        model: whose tokenizer turns tokens into text for people; None shows their ids.

    Raises:
        DatastoreError: the datastore cannot be opened, does not fit the model, or has no passages.
        ModelError: the model or the embedder cannot be loaded.
    """
    tokenizer = None if model is None else load_tokenizer(resolve_model(model))
    wanted = None if tokenizer is None else tokenizer_hash(tokenizer)
    datastore = Datastore.open(store, tokenizer=wanted, dense=bool(texts), preload=False)
    try:
        if contexts:
            lookup = datastore.lookup(contexts)
            if as_json:
                print(json.dumps(_fields(lookup)), flush=True)
            else:
                _print_trees(lookup, tokenizer)
        if texts:
            _print_passages(datastore, texts, k, tokenizer, as_json=as_json)
    finally:
        datastore.close()
    return 0


def _fields(lookup: Lookup) -> dict[str, list[int]]:
    names = ("match_lengths", "offsets", "tokens", "parents", "counts")
    return {name: getattr(lookup, name).tolist() for name in names}


def _print_trees(lookup: Lookup, tokenizer: PreTrainedTokenizerBase | None) -> None:
    for number, length in enumerate(lookup.match_lengths.tolist()):
        print(f"context {number}: the longest match has {length} tokens")
        begin, end = int(lookup.offsets[number]), int(lookup.offsets[number + 1])
        for depth, token, count in _walk(
            *(array[begin:end].tolist() for array in (lookup.tokens, lookup.parents, lookup.counts))
        ):
            print(f"{count:>8}  {'  ' * depth}{_shown([token], tokenizer)}")


def _walk(tokens: list[int], parents: list[int], counts: list[int]) -> Iterator[tuple[int, int, int]]:
    """Depth, token and count of each node, depth first, the most frequent child first."""
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(parents):
        children.setdefault(parent, []).append(node)
    stack = [(0, node) for node in sorted(children.get(-1, ()), key=lambda node: counts[node])]
    while stack:
        depth, node = stack.pop()
        yield depth, tokens[node], counts[node]
        stack += [(depth + 1, child) for child in sorted(children.get(node, ()), key=lambda node: counts[node])]


def _print_passages(
    datastore: Datastore, texts: Sequence[str], k: int, tokenizer: PreTrainedTokenizerBase | None, *, as_json: bool
) -> None:
    found = datastore.search(texts, k)
    if as_json:
        print(json.dumps([[_passage(passage) for passage in passages] for passages in found]), flush=True)
        return
    for text, passages in zip(texts, found, strict=True):
        print(f"passages near to {text!r}")
        for passage in passages:
            print(f"{passage.score:>8.3f}  {passage.document} tokens {passage.begin} to {passage.end}")
            print(f"          {_shown(passage.tokens.tolist(), tokenizer)}")


def _passage(passage: Any) -> dict[str, Any]:
    return {
        "score": round(passage.score, 6),
        "document": passage.document,
        "begin": passage.begin,
        "end": passage.end,
        "tokens": passage.tokens.tolist(),
    }


def _shown(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase | None) -> str:
    return " ".join(map(str, tokens)) if tokenizer is None else repr(tokenizer.decode(list(tokens)))
