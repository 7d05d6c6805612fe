"""What a language model is here: loading, alignment, the head, memory."""
