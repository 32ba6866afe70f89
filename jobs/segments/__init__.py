"""From documents to the segments of a datastore: chunks, the tasks that make segments, and the files of a store."""
