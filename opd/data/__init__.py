"""From the rows of a dataset to token ids, from token ids to batches, and from completions to rewards."""
