"""Decoding: token trees, verification, the slot KV cache and the engine that runs rounds.

Knows nothing of Ray, FAISS, Parquet or the command line; needs torch, transformers, numpy and numba only.

Axis letters used in shape comments throughout the project:
    S  slots in a round            N  nodes of one slot's run (known tokens and tree)
    T  tokens of a packed row      M  rows of logits
    L  cache length of a slot      V  vocabulary
    H  query heads, K  KV heads    D  head dimension
    P  pages of the KV pool        B  pages in a block table row
"""
