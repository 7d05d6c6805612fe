"""Further papers, one file each."""
