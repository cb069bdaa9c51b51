"""Floor 2: from rows of a dataset to token ids, and from token ids to batches."""
