"""Who does what and when: the parent of a run, its plan and its checks."""
