"""The version, alone in a module so that building the package imports nothing."""

__version__ = "0.6.0"
