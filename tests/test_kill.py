"""Killed runs: what they leave can be resumed, to the result of a run that nobody stopped."""
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
from safetensors import safe_open

from conftest import PROGRAM, leftovers
from minbert.cli import main

RUN = ["run", "E9", "--preset", "pocket", "--epochs", ".3", "--limit", "80"]
METHODS = ["run", "S10", "--preset", "pocket", "--epochs", ".1", "--limit", "40", "--atlas"]
READING = ["pretrain", "rtd", "--preset", "pocket", "--steps", "10"]

# the real program, but it saves its state after every step
eager = """
import sys
from dataclasses import replace
import minbert.runs as runs
start = runs._Session.__init__
def often(self, run, model, data, config, plugs):
    start(self, run, model, data, replace(config, save_seconds=0), plugs)
runs._Session.__init__ = often
from minbert.cli import main
{}
sys.exit(main(sys.argv[1:]))
"""

# the same, killed in the middle of the Nth write of one kind
half = """
import os, signal
import minbert.{module} as m
save, count = m.save_file, [0]
def half(tensors, path, *a, **kw):
    save(tensors, path, *a, **kw)
    count[0] += 1
    if count[0] == {nth}:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
m.save_file = half
"""
before = """
import os, signal
really_replace = os.replace
def kill(a, b):
    if str(b).endswith("{name}"): os.kill(os.getpid(), signal.SIGKILL)
    return really_replace(a, b)
os.replace = kill
"""
moved_away = """
import os, pathlib, signal
rename = pathlib.Path.rename
def then_kill(self, target):
    got = rename(self, target)
    if pathlib.Path(target).name == "old": os.kill(os.getpid(), signal.SIGKILL)
    return got
pathlib.Path.rename = then_kill
"""
# a signal a little after the Nth write of a state, at any moment; timed inside, since a watcher
# outside may sleep through the whole run
soon = """
import os, signal, threading
import minbert.runs as m
save, count = m.save_file, [0]
def then(tensors, path, *a, **kw):
    save(tensors, path, *a, **kw)
    count[0] += 1
    if count[0] == {nth}: # the one before is in its place
        threading.Timer({wait}, os.kill, (os.getpid(), signal.{what})).start()
m.save_file = then
"""
killed = {"the state": half.format(module="runs", nth=5),
          "the model": half.format(module="heads", nth=1),
          "the model, old one moved away": moved_away,
          "the configuration": before.format(name="config.json"),
          "the result": before.format(name="result.json"),
          "the predictions": before.format(name="dev-para.csv")}


def call(args, out, data_dir):
    "The arguments of the program; the data directory has no CFIMDB, whose texts are read, too."
    name, what, *rest = args
    if name == "pretrain":
        return [name, what, str(out), *rest, "--data", "pocket"]
    return [name, what, *rest, "--out", str(out), "--data", str(data_dir)]


def finished(data_dir, out, args, *more):
    "A run that nobody stops, in this process."
    assert main([*call(args, out, data_dir), *more]) == 0
    return out


@pytest.fixture(scope="module")
def uninterrupted(data_dir, tmp_path_factory):
    return finished(data_dir, tmp_path_factory.mktemp("whole") / "run", RUN)


def finish(out, data_dir):
    "Resume, here, in another process than the one that was killed."
    finished(data_dir, out, RUN, "--resume")


timed = ("seconds", "wall_s", "cpu_s", "look_s", "peak_rss_mb")


def bare(x):
    "Without what is another each time."
    if isinstance(x, dict):
        return {k: bare(v) for k, v in x.items() if k not in timed}
    return [bare(v) for v in x] if isinstance(x, list) else x


def log(out):
    "The metrics without wall-clock times."
    return [bare(json.loads(x)) for x in (out / "metrics.jsonl").read_text().splitlines()]


def same(out, whole):
    "Result, predictions, weights and metrics are equal to the last bit."
    a, b = (bare(json.loads((p / "result.json").read_text())) for p in (out, whole))
    assert a == b
    names = {p.relative_to(whole) for p in whole.rglob("*") if p.suffix in (".csv", ".safetensors")}
    assert names and any(p.suffix == ".safetensors" for p in names)
    for name in names:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert log(out) == log(whole)
    assert not (out / "state").exists()


def start(code, out, data_dir, args=RUN):
    "Start the program, with a few lines of Python before it."
    program = [sys.executable, "-c", eager.replace("{}", code)]
    return subprocess.Popen([*program, *call(args, out, data_dir), "--resume"], cwd=out.parent,
                            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, preexec_fn=hear_ctrl_c)


def hear_ctrl_c():
    "Tests that are run in the background ignore Ctrl-C, and so would the programs they start."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(condition, process, seconds=60):
    "Look again and again until the condition holds."
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read().decode()[-2000:]
        assert time.monotonic() < end, "nothing happened"
        time.sleep(.002)


def lines(out):
    "Lines in the metrics so far."
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def kill_after(process, condition):
    "Kill it when the condition holds."
    try:
        wait_for(condition, process)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL, "finished before it was killed"


def kept_state(out):
    "The newest state of a killed run: a kill between two renames leaves only the one before."
    last = out / "state" / "last.safetensors"
    return last if last.exists() else last.with_name("before.safetensors")


def test_killed_after_the_first_saved_state(uninterrupted, data_dir, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen([str(PROGRAM), *RUN, "--data", str(data_dir), "--out", str(out)],
                               cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE)
    try:
        wait_for((out / "state" / "last.safetensors").exists, process)
        now = lines(out)
    except BaseException:
        process.kill()
        raise
    kill_after(process, lambda: lines(out) > now + 2) # steps that no state knows of
    assert not (out / "result.json").exists()
    finish(out, data_dir)
    same(out, uninterrupted)


def test_killed_again_and_again(uninterrupted, data_dir, tmp_path):
    out, steps = tmp_path / "run", 0
    for wait in (.03, .11):
        process = start(soon.format(nth=2, wait=wait, what="SIGKILL"), out, data_dir)
        process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL, "finished before it was killed"
        with safe_open(kept_state(out), "pt") as f:
            now = int(f.metadata()["step"])
        assert now > steps
        steps = now
    assert len(log(out)) >= steps
    finish(out, data_dir)
    same(out, uninterrupted)


@pytest.mark.parametrize("what", killed)
def test_killed_while_writing(what, uninterrupted, data_dir, tmp_path):
    out = tmp_path / "run"
    if "old one" in what: # an earlier model is there and is about to be replaced
        shutil.copytree(uninterrupted / "model", out / "model")
        shutil.copy(uninterrupted / "config.json", out)
    process = start(killed[what], out, data_dir)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL and not (out / "result.json").exists()
    finish(out, data_dir)
    same(out, uninterrupted)
    assert not leftovers(out), "what the kill left is swept up"


def test_killed_before_anything_was_written(data_dir, tmp_path):
    "Only a temporary file is there; the run starts without --resume."
    out = tmp_path / "run"
    out.mkdir()
    (out / ".config.json.x1y2z3").write_text("{")
    args = ["run", "S1", "--preset", "pocket", "--epochs", ".02", "--data", str(data_dir)]
    assert main([*args, "--out", str(out)]) == 0
    assert not leftovers(out)


def test_a_line_of_metrics_that_was_cut_off(uninterrupted, data_dir, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_bytes((uninterrupted / "config.json").read_bytes())
    (out / "metrics.jsonl").write_text('{"step": 1, "lr": 0.0')
    finish(out, data_dir)
    same(out, uninterrupted)


def test_a_result_of_no_length(uninterrupted, data_dir, tmp_path):
    out = shutil.copytree(uninterrupted, tmp_path / "run")
    (out / "result.json").write_bytes(b"")
    finish(out, data_dir)
    same(out, uninterrupted)


def test_a_finished_run_is_not_run_again(uninterrupted, data_dir):
    def now():
        files = [p for p in uninterrupted.rglob("*") if p.is_file()]
        return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in files}
    then = now()
    finish(uninterrupted, data_dir)
    assert then == now()


def test_damaged_files_are_named(data_dir, tmp_path, fails):
    out = tmp_path / "run"
    process = start(killed["the state"], out, data_dir)
    process.communicate(timeout=120)
    again = [*RUN, "--data", data_dir, "--out", out, "--resume"]
    state = out / "state" / "last.safetensors"
    whole, earlier = state.read_bytes(), state.with_name("before.safetensors")
    earlier.unlink()                                # it would serve
    for damaged in (whole[:-500], whole[:-500] + bytes(500), b""):
        state.write_bytes(damaged)
        fails(r"last\.safetensors: this state is damaged .*delete the directory state", *again)
    state.write_bytes(whole)
    metrics = (out / "metrics.jsonl").read_bytes()
    (out / "metrics.jsonl").write_bytes(b"\0\0\0\n" + metrics)
    fails(r"metrics\.jsonl, line 1 is damaged", *again)
    (out / "metrics.jsonl").write_bytes(metrics)
    (out / "config.json").write_bytes(b"")
    fails(r"no run to resume", *again)


def test_stopped_with_ctrl_c(uninterrupted, data_dir, tmp_path):
    out = tmp_path / "run"
    process = start(soon.format(nth=2, wait=.01, what="SIGINT"), out, data_dir)
    err = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 130 and "--resume" in err and "Traceback" not in err, err
    finish(out, data_dir)
    same(out, uninterrupted)


@pytest.mark.parametrize("args", [METHODS, READING], ids=["surgery, SMART and atlas", "RTD"])
def test_methods_go_on_as_if_nothing_had_happened(args, data_dir, tmp_path):
    "Surgery draws orders, SMART has a teacher, RTD takes two steps for each batch."
    whole = finished(data_dir, tmp_path / "whole", args)
    out = tmp_path / "out" / "run"
    out.parent.mkdir()
    process = start(soon.format(nth=6, wait=.02, what="SIGKILL"), out, data_dir, args)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, "finished before it was killed"
    with safe_open(kept_state(out), "pt") as f:
        assert args is READING or any(k.startswith("plug.") for k in f.keys())
        assert args is METHODS or int(f.metadata()["step"]) % 2 == 0
    finished(data_dir, out, args, "--resume")
    same(out, whole)
    if args is METHODS:
        assert any("atlas" in x for x in log(out))
