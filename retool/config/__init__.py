"""Command line and YAML → typed frozen dataclasses, on OmegaConf: schema (what there is), read
(what was asked for), help.
"""

from retool.config.help import help_text
from retool.config.read import nearest, parse, read, to_dict
from retool.config.schema import REQUIRED, ConfigError, Fault, Leaf, Parsed, leaves, option

__all__ = [
    "REQUIRED",
    "ConfigError",
    "Fault",
    "Leaf",
    "Parsed",
    "help_text",
    "leaves",
    "nearest",
    "option",
    "parse",
    "read",
    "to_dict",
]
