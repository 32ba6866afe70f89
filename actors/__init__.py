"""Ray actors around the pipeline and the datastore: plain classes, lifted with `ray.remote` at the call site."""
