"""Configuration of a run: typed schema, composition from YAML, rules across fields, and pure token and tile geometry.

Nothing here imports torch, so that a wrong setting is found within a second and every other part can import this one.
"""

from .errors import ConfigError

__all__ = ["ConfigError"]
