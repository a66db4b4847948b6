"""The only code that touches TRL's internals."""
