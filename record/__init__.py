"""What a run writes down: the log and its keys, checkpoints, the trace, and what a person reads."""
