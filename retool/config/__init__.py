"""Command line and YAML → typed frozen dataclasses, on OmegaConf.

schema: what keys there are · words: what was given for which key · values: as its type reads it ·
read: all of it, with every fault · help · options: the keys that both commands have · redact.
"""

from retool.config.help import help_text
from retool.config.read import parse, read, to_dict
from retool.config.schema import REQUIRED, ConfigError, Fault, Leaf, Parsed, leaves, option
from retool.config.words import nearest

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
