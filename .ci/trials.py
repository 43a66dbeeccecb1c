"""Sum up what the long tests have counted, for the page of promises.

    MINBERT_FUZZ=long pytest -s -n 0 tests/test_fuzz.py > fuzz.log
    MINBERT_FAULTS=16 pytest -s -n 0 tests/test_faults.py > faults.log
    python .ci/trials.py fuzz.log faults.log          # writes nbs/results/trials.json

A log of a test that failed is refused: the counts of a page must be those of runs that passed.
"""
import json
import re
import sys
from collections import Counter
from pathlib import Path

from minbert.runs import environment

KINDS = {r"(\d+) damaged tables:": "damaged tables", r"(\d+) tables of odd cells": "tables of odd cells",
         r"(\d+) damaged checkpoints:": "damaged checkpoints", r"(\d+) damaged run directories:": "damaged run directories",
         r"(\d+) kills at one of": "kills at a change of the disk", r"(\d+) kills at random moments": "kills at random moments",
         r"(\d+) times ENOSPC": "disks that are full", r"(\d+) times EROFS": "disks that turn read-only",
         r"(\d+) of \d+ disks full for real": "file systems that are really full",
         r"(\d+) states with a flipped byte": "states with a flipped byte", r"(\d+) flipped bytes in": "models with a flipped byte",
         r"(\d+) runs stopped by SIG": "runs stopped by a signal", r"(\d+) pairs of processes": "pairs of processes on one directory"}


def counts(text):
    "Kind → how many a log tells of."
    if re.search(r"^(FAILED|ERROR)|\d+ (failed|error)", text, re.M) or not re.search(r"\d+ passed", text):
        raise SystemExit("a log without a clean end: its counts are not taken")
    return Counter({kind: sum(map(int, re.findall(pattern, text))) for pattern, kind in KINDS.items()})


if __name__ == "__main__":
    total = sum((counts(Path(name).read_text()) for name in sys.argv[1:]), Counter())
    made = {k: v for k, v in environment().items() if k in ("processor", "versions")}
    place = Path(__file__).resolve().parent.parent / "nbs/results/trials.json"
    place.write_text(json.dumps({"about": "how often the long tests tried each fault; every trial passed", **made,
                                 "trials": dict(total)}, indent=1) + "\n")
    print(json.dumps(dict(total), indent=1))
