"""Do transformers and the installed vLLM compute one law for each architecture? Tiny random models of both."""
