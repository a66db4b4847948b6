"""Prompts to try an engine with, and how a case is written down."""
