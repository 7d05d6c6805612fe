"""From the rows of a data set to token ids, and from a response to a verdict; and the toy task."""
