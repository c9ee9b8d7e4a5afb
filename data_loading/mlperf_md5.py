"""MLPerf's published MD5s of KiTS19's 420 preprocessed files, and what is known about single cases."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

MLPERF_CASES = 210
# SHA-256 over the lines "md5  name\n", sorted by name, of all 420 published digests.
MLPERF_FINGERPRINT = "e7c2853b7ae3dee118170eff39211ffae5a173c95198f31e309c47dcc843abb5"

# Files whose digest is known to differ from MLPerf's although the case's mask has it, and why.
KNOWN_DIFFERENCES = {
    "case_00043_x.npy": "the published scan has given another digest than MLPerf's since April 2022 at the latest, "
    "while its mask gives MLPerf's; it was probably replaced (mlcommons/training, issue 545)"
}

_CORRECTED = "mask corrected by the owners in December 2019"
_DROPPED = "left out of training by nnU-Net, the winner of the challenge"
# Cases whose masks or scans others have doubted. They are part of the benchmark all the same.
DOUBTFUL_CASES = {
    "case_00015": _CORRECTED,
    "case_00023": f"{_CORRECTED}; {_DROPPED}",
    "case_00037": _CORRECTED,
    "case_00068": _DROPPED,
    "case_00125": f"{_CORRECTED}; {_DROPPED}",
    "case_00133": _DROPPED,
    "case_00160": "slices of 512 x 796 pixels, where all others are square",
}


@cache
def published_md5() -> Mapping[str, str]:
    """Returns MLPerf's {file: MD5}."""
    found: dict[str, str] = json.loads(Path(__file__).with_name("mlperf_md5.json").read_text(encoding="utf-8"))
    return found


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Files of a folder beside MLPerf's digests, by name.

    Attributes:
        known: those that differ as in `KNOWN_DIFFERENCES`.
        missing: those in MLPerf's list that the folder does not have.
    """

    identical: list[str]
    different: list[str]
    known: list[str]
    missing: list[str]

    @property
    def accepted(self) -> bool:
        """Whether these are MLPerf's 420 files, but for known differences."""
        return not self.different and not self.missing


def compare(digests: Mapping[str, str]) -> Comparison:
    """Compares {file: MD5} with MLPerf's digests; files that MLPerf does not list are left aside."""
    published = published_md5()
    identical = [name for name, md5 in published.items() if digests.get(name) == md5]
    differing = [name for name, md5 in published.items() if digests.get(name, md5) != md5]
    known = [n for n in differing if n in KNOWN_DIFFERENCES and n.replace("_x.", "_y.") in identical]
    return Comparison(
        identical=identical,
        different=[name for name in differing if name not in known],
        known=known,
        missing=[name for name in published if name not in digests],
    )


def describe_known(name: str, md5: str) -> str:
    """Returns one line about a file with a known difference.

    Args:
        md5: the digest that it has.
    """
    return f"{name}: MD5 {md5}, not MLPerf's {published_md5()[name]}. Known: {KNOWN_DIFFERENCES[name]}"


def doubtful_cases(digests: Mapping[str, str]) -> dict[str, str]:
    """Returns {case: why} of the doubtful cases among these files, whose scan or mask must have MLPerf's digest.

    A phantom or another data set may have cases of the same names.
    """
    identical = {name[: -len("_x.npy")] for name in compare(digests).identical}
    return {case: why for case, why in DOUBTFUL_CASES.items() if case in identical}
