"""Runs that are killed: what they leave can always be resumed, and the result is that of a run that nobody stopped."""
import json, shutil, signal, subprocess, sys, time

import pytest
from safetensors import safe_open

from conftest import PROGRAM, leftovers, run
from minbert.cli import main

RUN = ["run", "E9", "--preset", "pocket", "--epochs", ".5", "--limit", "100"]

# the real program, but it saves its state after every step
eager = """
import sys
import minbert.recipes as recipes
from functools import partial
from minbert.train import train
recipes.train = partial(train, save_seconds=0)
from minbert.cli import main
{}
sys.exit(main(sys.argv[1:]))
"""

# the same, killed in the middle of the Nth write of one kind
killed = {
    "the state": """
import minbert.train as m, os, signal
save, count = m.save_file, [0]
def half(tensors, path, **kw):
    save(tensors, path, **kw)
    count[0] += 1
    if count[0] == 5:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
m.save_file = half
""",
    "the model": """
import minbert.heads as m, os, signal
save, count = m.save_file, [0]
def half(tensors, path, **kw):
    save(tensors, path, **kw)
    count[0] += 1
    if count[0] == 1:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
m.save_file = half
""",
    "the model, old one moved away": """
import os, pathlib, signal
rename = pathlib.Path.rename
def then_kill(self, target):
    got = rename(self, target)
    if pathlib.Path(target).name == "old": os.kill(os.getpid(), signal.SIGKILL)
    return got
pathlib.Path.rename = then_kill
""",
    "the result": """
import minbert.data as m, os, signal
replace = os.replace
def kill(a, b):
    if str(b).endswith("result.json"): os.kill(os.getpid(), signal.SIGKILL)
    return replace(a, b)
os.replace = kill
""",
    "the predictions": """
import minbert.data as m, os, signal
replace = os.replace
def kill(a, b):
    if str(b).endswith("dev-para.csv"): os.kill(os.getpid(), signal.SIGKILL)
    return replace(a, b)
os.replace = kill
""",
}


@pytest.fixture(scope="module")
def uninterrupted(data_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")/"run"
    got = run(PROGRAM, *RUN, "--data", data_dir, "--out", out, cwd=out.parent)
    assert got.returncode == 0, got.stderr
    return out


def finish(out, data_dir):
    "Resume, here, in another process than the one that was killed."
    assert main([*RUN, "--data", str(data_dir), "--out", str(out), "--resume"]) == 0


def log(out):
    "The metrics without wall-clock times."
    lines = [json.loads(x) for x in (out/"metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if k != "seconds"} for x in lines]


def same(out, whole):
    "Result, predictions, weights and metrics are equal to the last bit."
    a, b = (json.loads((p/"result.json").read_text()) for p in (out, whole))
    for got in (a, b): got["curve"] = [{k: v for k, v in look.items() if k != "seconds"} for look in got["curve"]]
    measured = ("wall_s", "cpu_s", "peak_rss_mb")
    assert {k: v for k, v in a.items() if k not in measured} == {k: v for k, v in b.items() if k not in measured}
    for name in ("dev-sst.csv", "dev-para.csv", "dev-sts.csv", "model/model.safetensors", "model/heads.safetensors"):
        assert (out/name).read_bytes() == (whole/name).read_bytes(), name
    assert log(out) == log(whole)
    assert not (out/"state").exists()


def start(code, out, data_dir):
    "Start the program, with a few lines of Python before it."
    return subprocess.Popen([sys.executable, "-c", eager.format(code), *RUN, "--data", str(data_dir), "--out", str(out), "--resume"], cwd=out.parent,
                            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=hear_ctrl_c)


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


def test_killed_after_the_first_saved_state(uninterrupted, data_dir, tmp_path):
    out = tmp_path/"run"
    process = subprocess.Popen([str(PROGRAM), *RUN, "--data", str(data_dir), "--out", str(out)], cwd=tmp_path, stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    lines = lambda: (out/"metrics.jsonl").read_text().count("\n")
    try:
        wait_for((out/"state"/"last.safetensors").exists, process)
        now = lines()
        wait_for(lambda: lines() > now + 2, process)      # steps that no state knows of: they are done again
    finally: process.kill()
    assert process.wait() == -signal.SIGKILL and not (out/"result.json").exists()
    finish(out, data_dir)
    same(out, uninterrupted)


def test_killed_again_and_again(uninterrupted, data_dir, tmp_path):
    out, steps = tmp_path/"run", 0
    state = out/"state"/"last.safetensors"
    for wait in (.03, .11):
        process = start("", out, data_dir)
        before = state.stat().st_mtime_ns if state.exists() else 0
        try:
            wait_for(lambda: state.exists() and state.stat().st_mtime_ns > before, process)
            time.sleep(wait)
        finally: process.kill()
        assert process.wait() == -signal.SIGKILL, "finished before it was killed"
        with safe_open(state, "pt") as f: now = int(f.metadata()["step"])
        assert now > steps
        steps = now
    assert len(log(out)) >= steps
    finish(out, data_dir)
    same(out, uninterrupted)


@pytest.mark.parametrize("what", killed)
def test_killed_while_writing(what, uninterrupted, data_dir, tmp_path):
    out = tmp_path/"run"
    if "old one" in what:      # an earlier model is there and is about to be replaced
        shutil.copytree(uninterrupted/"model", out/"model")
        shutil.copy(uninterrupted/"config.json", out)
    process = start(killed[what], out, data_dir)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL and not (out/"result.json").exists()
    finish(out, data_dir)
    same(out, uninterrupted)
    assert not leftovers(out), "what the kill left is swept up"


def test_a_line_of_metrics_that_was_cut_off(uninterrupted, data_dir, tmp_path):
    out = tmp_path/"run"
    out.mkdir()
    (out/"config.json").write_bytes((uninterrupted/"config.json").read_bytes())
    (out/"metrics.jsonl").write_text('{"step": 1, "lr": 0.0')
    finish(out, data_dir)
    same(out, uninterrupted)


def test_a_finished_run_is_not_run_again(uninterrupted, data_dir):
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in uninterrupted.rglob("*") if p.is_file()}
    finish(uninterrupted, data_dir)
    assert before == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in uninterrupted.rglob("*") if p.is_file()}


def test_a_damaged_state_is_named(data_dir, tmp_path, fails):
    out = tmp_path/"run"
    process = start(killed["the state"], out, data_dir)
    process.communicate(timeout=120)
    state = out/"state"/"last.safetensors"
    state.write_bytes(state.read_bytes()[:-500])
    fails(r"last\.safetensors: this state is damaged", *RUN, "--data", data_dir, "--out", out, "--resume")


def test_stopped_with_ctrl_c(uninterrupted, data_dir, tmp_path):
    out = tmp_path/"run"
    process = start("", out, data_dir)
    try:
        wait_for((out/"state"/"last.safetensors").exists, process)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=60)[1].decode()
    finally: process.kill()
    assert process.returncode == 130 and "--resume" in err and "Traceback" not in err, err
    finish(out, data_dir)
    same(out, uninterrupted)
