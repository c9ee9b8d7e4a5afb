"""What a flag's text may be: converters for argparse, which tells their ArgumentTypeError with the flag's name."""

from __future__ import annotations

import argparse
import re
from typing import Any

from common.registry import Spec

# A master seed is below this.
SEED_LIMIT = 2**31
# Of `--submission_org`: no result has it.
PLACEHOLDER_ORG = "SUBMISSION_ORG_PLACEHOLDER"


def number(kind: type, low: float, high: float = float("inf"), below: bool = False) -> Any:
    """A number from `low` to `high`, or `below` it."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of this kind ({kind.__name__})") from None
        if not low <= value <= high or value == float("inf") or (below and value == high):
            raise argparse.ArgumentTypeError(f"{text} is outside {low:g} to {'below ' * below}{high:g}")
        return value

    return convert


def axes(text: str) -> str:
    """Some of D, H and W, each once."""
    if not set(text) <= set("DHW") or len(set(text)) != len(text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected some of D, H and W, such as HW")
    return text


def interval(text: str) -> str:
    """`10m`, `2e` or `never`, as it stands: the command line is what the log states."""
    parse_interval(text)
    return text


def trusted_spec(text: str) -> Spec:
    """A spec that the user typed: it may import whatever it names."""
    return Spec(text, trusted=True)


def parse_interval(text: str) -> tuple[float, int]:
    """(minutes, epochs) of `--ckpt_every`; the other, or both where it is `never`, 0."""
    if text == "never":
        return 0.0, 0
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([me])", text)
    if match is None or not float(match[1]) or (match[2] == "e" and "." in match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is neither minutes (10m) nor epochs (2e) nor never")
    return (float(match[1]), 0) if match[2] == "m" else (0.0, int(match[1]))
