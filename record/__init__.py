"""What a run writes down: the log and its keys, checkpoints, the trace, texts for people."""
