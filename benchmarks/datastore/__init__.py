"""Measurements of the datastore: building, lookups, dense search and the embedder."""
