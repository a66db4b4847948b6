"""The only code that touches vLLM's internals."""
