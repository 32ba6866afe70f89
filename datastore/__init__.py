"""The datastore: suffix and dense indexes of text corpora. Needs neither Ray nor a model, but for the embedder.

Stable entry points: `Datastore` to read one, `LiveStore` for text that is still growing, `Lookup` for what both return.
"""

from datastore.live import LiveStore
from datastore.store import Datastore, Passage
from pipeline.lookup import Lookup

__all__ = ["Datastore", "LiveStore", "Lookup", "Passage"]
