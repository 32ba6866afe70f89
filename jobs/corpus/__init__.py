"""The corpus of a datastore: from what the user names to documents, streamed in a fixed order, each exact text once."""
