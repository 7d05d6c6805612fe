"""From a data set's rows to token ids, and from a response to a verdict; and the built-in toy task."""
