"""What generates: transformers, vLLM, and how a position is drawn."""
