"""Training of draft heads: features of the target, the unrolled loss, batches. Knows nothing of jobs or clusters."""
