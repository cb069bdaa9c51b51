"""Floor 0: what can be configured, what combinations make sense, and where the YAML files are. Nothing here imports torch."""
