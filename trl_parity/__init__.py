"""trl-parity: is the vLLM engine that samples the same policy as the TRL trainer that learns?"""

from ._version import __version__

__all__ = ["__version__"]
