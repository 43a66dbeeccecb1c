"""Faults in number: kills at every change of the disk and at random moments, full and read-only disks, damaged bytes, signals,
a clock that jumps back, two processes on one directory, a worker that vanishes. What is resumed must be equal to the last bit.

Short here. MINBERT_FAULTS=20 makes everything twenty times as many; the counts are printed.
"""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from conftest import leftovers, plain
from minbert.core import UserError
from minbert.heads import MultitaskBert
from minbert.runs import RunDir
from test_kill import bare

TIMES = int(os.environ.get("MINBERT_FAULTS", "1"))
SMALL = ["--preset", "pocket", "--data", "pocket"]
JOBS = {
    "round robin": ["run", "E9", *SMALL, "--epochs", ".05", "--limit", "40", "--out", "run"],
    "methods": ["run", "S10", *SMALL, "--epochs", ".03", "--limit", "24", "--atlas", "--out", "run"],
    "RTD": ["pretrain", "rtd", "run", *SMALL, "--steps", "3"],
    "MLM": ["pretrain", "mlm", "run", *SMALL, "--steps", "4"],
    "own tasks": ["train", "own.toml", "--init", "pocket", "--epochs", ".2", "--out", "run"],
    "best of rows": ["run", "E18", *SMALL, "--epochs", ".02", "--limit", "24", "--out", "run"]}
OWN = """[tasks.tone]
text = ["sentence"]
label = "tone"
train = "tone.csv"
dev = 0.3
test = "new.csv"
"""


class Forks:
    "A process that has imported everything and forks a child for each run."
    def __init__(self):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
        self.process = subprocess.Popen([sys.executable, Path(__file__).with_name("forks.py")], env=env, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, place, argv, **fault):
        "Start a child without waiting for it."
        what = {"argv": argv, "cwd": str(place), "place": str(place), "log": str(place) + ".log", **fault}
        Path(what["log"]).write_text("")
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return Path(what["log"])

    def end(self):
        self.process.stdin.close()
        self.process.wait(60)

    def __call__(self, place, argv, **fault):
        "Start a child, wait for its end: how it ended, and what it said."
        log = self.ask(place, argv, **fault)
        return json.loads(self.process.stdout.readline()) | {"said": log.read_text()}


@pytest.fixture(scope="module")
def forks():
    started = Forks()
    yield started
    started.end()


@pytest.fixture(scope="module")
def ground():
    "A folder for many runs, in memory where there is one."
    memory = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


def fresh(ground, name="place"):
    "A new working directory with somebody's own task in it."
    place = ground / name
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    (place / "own.toml").write_text(OWN)
    rows = [f"{'good' if k % 3 else 'bad'} film number {k},{'yes' if k % 3 else 'no'}\n" for k in range(60)]
    (place / "tone.csv").write_text("sentence,tone\n" + "".join(rows))
    (place / "new.csv").write_text("sentence\na good one\n")
    return place


def after_the_result(path):
    "A file that was half written when the run itself had ended: answers to a test file, the model card. It stays, hidden."
    return path.name.startswith((".test-", ".README.md."))


def content(place):
    "Every file that runs have left, without what is another each time."
    found = {}
    for p in sorted(place.rglob("*")):
        if p.is_file() and not after_the_result(p):
            data = p.read_bytes()
            if p.suffix in (".json", ".jsonl"): data = [bare(json.loads(x)) for x in ([data] if p.suffix == ".json" else data.splitlines())]
            found[str(p.relative_to(place))] = data
    return found


@pytest.fixture(scope="module")
def whole(forks, ground):
    "Job → what it leaves when nothing happens, how many changes of the disk that takes, and how long."
    found = {}
    def get(name):
        if name not in found:
            place = fresh(ground, "whole")
            got = forks(place, JOBS[name] + ["--resume"])
            assert got["code"] == 0, got["said"]
            found[name] = content(place), got["changes"], got["seconds"]
        return found[name]
    return get


def resumed(forks, place, name, whole):
    "The job goes on and ends as if nothing had happened."
    got = forks(place, JOBS[name] + ["--resume"])
    assert got["code"] == 0 and "Traceback" not in got["said"], got["said"]
    want = whole(name)[0]
    now = content(place)
    assert now.keys() == want.keys(), now.keys() ^ want.keys()
    assert not [k for k in want if now[k] != want[k]]
    assert not [x for x in leftovers(place) if not after_the_result(Path(x))]


def spread_over(n, times, seed):
    "So many of the numbers from 1 to n, one from each stretch, or all of them."
    if times >= n: return range(1, n + 1)
    edges = np.linspace(0, n, times + 1).astype(int)
    return [int(np.random.default_rng([*np.ravel(seed), k]).integers(a, b)) + 1 for k, (a, b) in enumerate(zip(edges, edges[1:]))]


def count(capsys, *words):
    "Say how many there were."
    with capsys.disabled(): print("\n   ", *words, end="")


@pytest.mark.parametrize("name", JOBS)
def test_killed_at_a_change_of_the_disk(name, forks, ground, whole, capsys):
    "Just before it, or with half of a file of tensors written: configuration, metrics, states, models, predictions, results."
    numbers = spread_over(whole(name)[1], (3 if name == "round robin" else 1) * TIMES, 1)
    for nth in numbers:
        place = fresh(ground)
        got = forks(place, JOBS[name] + ["--resume"], fault="kill", nth=nth)
        assert got["code"] == -signal.SIGKILL, (nth, got["said"])
        resumed(forks, place, name, whole)
    count(capsys, f"{len(numbers)} kills at one of {whole(name)[1]} changes of the disk ({name}), 0 differences")


@pytest.mark.parametrize("name", JOBS)
def test_killed_at_random_moments(name, forks, ground, whole, capsys):
    "Again and again, until it gets to its end."
    rng, place, kills, ends = np.random.default_rng(2), fresh(ground), 0, 0
    while kills < TIMES:
        got = forks(place, JOBS[name] + ["--resume"], signal=signal.SIGKILL, seconds=float(rng.uniform(0, whole(name)[2])))
        assert got["code"] in (0, -signal.SIGKILL), got["said"]
        kills += got["code"] != 0
        if got["code"] == 0:
            ends += 1
            resumed(forks, place, name, whole)
            place = fresh(ground)
    resumed(forks, place, name, whole)
    count(capsys, f"{kills} kills at random moments, {ends + 1} runs ended ({name}), 0 differences")


@pytest.mark.parametrize("name", ("round robin", "own tasks", "RTD"))
@pytest.mark.parametrize("fault", ("ENOSPC", "EROFS"))
def test_a_disk_that_refuses(fault, name, forks, ground, whole, capsys):
    "From some change on the disk is full or read-only: one plain line, exit code 1, and later the run goes on."
    numbers = spread_over(whole(name)[1], TIMES, [3, len(fault)])
    for nth in numbers:
        place = fresh(ground)
        got = forks(place, JOBS[name] + ["--resume"], fault=fault, nth=nth)
        lines = plain(got["said"])
        if got["code"] == 0:                        # only what is tidied up last was refused
            assert (place / "run/result.json").exists()
        else:
            assert got["code"] == 1 and "Traceback" not in got["said"], (nth, got["said"])
            assert lines[-1].startswith("minbert: ") and ("No space" in lines[-1] or "Read-only" in lines[-1]), lines
        resumed(forks, place, name, whole)
    count(capsys, f"{len(numbers)} times {fault} ({name}), 0 tracebacks, 0 differences")


def test_a_disk_that_is_really_full(forks, ground, whole, capsys):
    "A file system of some bytes: one plain line, exit code 1; with more room the run goes on."
    rng, full, name = np.random.default_rng(7), 0, "round robin"
    room = sum(p.stat().st_size for p in (ground / "whole").rglob("*") if p.is_file()) if (ground / "whole").exists() else 10**6
    for _ in range(2 * TIMES):
        place, copy = fresh(ground), ground / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        size = int(2 ** rng.uniform(13, np.log2(4 * room)))
        got = forks(place, JOBS[name] + ["--resume"], full=size, copy=str(copy))
        if got["code"] == 77: pytest.skip("no file system of one's own here")
        said, first = got["said"].split("first: ")[0], re.search(r"first: (\d)", got["said"])[1]
        assert got["code"] == 0 and "Traceback" not in got["said"], (size, got["said"])
        if first == "1":
            full += 1
            assert plain(said)[-1].startswith("minbert: ") and "No space left" in said, (size, said)
        for extra in ("own.toml", "tone.csv", "new.csv"): shutil.copy(place / extra, copy)
        assert content(copy) == whole(name)[0]
    assert full
    count(capsys, f"{full} of {2 * TIMES} disks full for real, 0 tracebacks, 0 differences")


def interrupted(forks, ground, whole, name="round robin", least=3):
    "A run that was killed with two states on the disk."
    place, changes = fresh(ground), whole(name)[1]
    for nth in range(changes // 2, changes):
        got = forks(place, JOBS[name] + ["--resume"], fault="kill", nth=nth)
        assert got["code"] == -signal.SIGKILL
        if (place / "run/state/before.safetensors").exists() and (place / "run/state/last.safetensors").exists(): return place
        place = fresh(ground)


def flip(path, rng):
    "Another byte somewhere in a file."
    data = bytearray(path.read_bytes())
    data[int(rng.integers(len(data)))] ^= int(rng.integers(1, 256))
    path.write_bytes(data)


def test_a_flipped_byte_in_a_state(forks, ground, whole, capsys):
    "It is noticed wherever it is, and the state before it serves; if both are damaged, the run says so."
    kept, rng = interrupted(forks, ground, whole), np.random.default_rng(4)
    kept = kept.rename(ground / "kept")
    for _ in range(TIMES):
        place = ground / "place"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(kept, place)
        flip(place / "run/state/last.safetensors", rng)
        resumed(forks, place, "round robin", whole)
        assert "going on from the state before it" in Path(str(place) + ".log").read_text()
    shutil.rmtree(place)
    shutil.copytree(kept, place)
    for name in ("last", "before"): flip(place / f"run/state/{name}.safetensors", rng)
    got = forks(place, JOBS["round robin"] + ["--resume"])
    last = plain(got["said"])[-1]
    assert got["code"] == 1 and "this state is damaged" in last and "delete the directory state there" in last, got["said"]
    shutil.rmtree(kept)
    count(capsys, f"{TIMES} states with a flipped byte, all noticed, 0 differences")


def test_a_flipped_byte_in_a_model(forks, ground, whole, capsys):
    "While the run goes on, it starts anew; when it has ended, whoever opens the model is told."
    kept, rng = interrupted(forks, ground, whole), np.random.default_rng(5)
    files = sorted(p.name for p in (kept / "run/model").iterdir())
    flip(kept / "run/model" / files[int(rng.integers(len(files)))], rng)
    resumed(forks, kept, "round robin", whole)
    assert "the run starts anew" in Path(str(kept) + ".log").read_text()
    model, noticed = kept / "run/model", 0
    for name in files:
        old = (model / name).read_bytes()
        for _ in range(TIMES):
            flip(model / name, rng)
            with pytest.raises(UserError, match="damaged|not readable"): MultitaskBert.from_pretrained(kept / "run")
            (model / name).write_bytes(old)
            noticed += 1
    MultitaskBert.from_pretrained(kept / "run")
    count(capsys, f"{noticed} flipped bytes in {len(files)} files of a model, all noticed")


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM), ids=("Ctrl-C", "SIGTERM"))
def test_a_signal_saves_and_says_how_to_go_on(number, forks, ground, whole, capsys):
    "Exit code 130; the state is that of the last step in the metrics, though none was due."
    rng, stopped, saved, k = np.random.default_rng(int(number)), 0, 0, 0
    while saved < TIMES and k < 40 * TIMES:
        place, k = fresh(ground), k + 1
        name = tuple(JOBS)[k % 5]
        got = forks(place, JOBS[name] + ["--resume"], signal=number, seconds=float(rng.uniform(.2, 1) * whole(name)[2]), lazy=True)
        if got["code"] == 0: continue
        stopped += 1
        assert got["code"] == 130 and "Traceback" not in got["said"], got["said"]
        assert plain(got["said"])[-1].startswith("minbert: stopped; go on with: minbert ") and got["said"].rstrip().endswith("--resume")
        steps = [x["step"] for x in RunDir(place / "run").lines()] if (place / "run").exists() else []
        state = place / "run/state/last.safetensors"
        if steps and max(steps) > 0 and not (place / "run/result.json").exists():
            with safe_open(state, "pt") as f: assert int(f.metadata()["step"]) == max(steps)
            saved += 1
        resumed(forks, place, name, whole)
    assert saved
    count(capsys, f"{stopped} runs stopped by {signal.Signals(number).name}, {saved} of them in training, 0 differences")


def test_a_clock_that_jumps_back(forks, ground, whole):
    place = fresh(ground)
    got = forks(place, JOBS["round robin"] + ["--resume"], fault="kill", nth=whole("round robin")[1] // 2, clock=True)
    assert got["code"] == -signal.SIGKILL
    for path in place.rglob("*"): os.utime(path, (0, 4e9))      # files from the future
    got = forks(place, JOBS["round robin"] + ["--resume"], clock=True)
    assert got["code"] == 0, got["said"]
    resumed(forks, place, "round robin", whole)


def test_two_processes_on_one_directory(forks, ground, whole, capsys):
    "One works; the other is told, or finds the result; nothing is written twice."
    other, rng, told = Forks(), np.random.default_rng(6), 0
    for _ in range(TIMES):
        place = fresh(ground)
        argv = JOBS["round robin"] + ["--resume"]
        logs = [forks.ask(place, argv)]
        time.sleep(float(rng.uniform(0, whole("round robin")[2])))
        logs.append(other.ask(place, argv, log=str(place) + ".other"))
        codes = [json.loads(x.process.stdout.readline())["code"] for x in (forks, other)]
        for code, log in zip(codes, logs):
            assert code == 0 or code == 1 and "another process is working on this run" in plain(log.read_text())[-1], log.read_text()
        assert 0 in codes
        told += 1 in codes
        resumed(forks, place, "round robin", whole)
    other.end()
    count(capsys, f"{TIMES} pairs of processes on one directory, {told} times one was told, 0 differences")
