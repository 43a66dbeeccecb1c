"""Sweeps: stopped and started again, two at once, from any folder, on a cluster."""
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from conftest import PROGRAM, run
from minbert.runs import kept, sweep

SWEEP = ["sweep", "--rows", "E1,S1", "--preset", "pocket", "--data", "pocket", "--out", "runs",
         "--results", "results"]


def start(*args, cwd):
    "A sweep in the background, in a group of its own."
    return subprocess.Popen([PROGRAM, *SWEEP, *args], cwd=cwd, stdin=subprocess.DEVNULL, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def rows(results):
    "The rows that are kept."
    return sorted(r["row"] for r in kept(results))


def test_a_killed_sweep_goes_on_and_repeats_nothing(tmp_path):
    first = start("--workers", "1", cwd=tmp_path)
    results, metrics = tmp_path / "results", tmp_path / "runs/S1-pocket-s0/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size > 2000): # in the second run
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()
        time.sleep(.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert rows(results) == ["E1"]
    before = (results / "E1-pocket-s0.json").read_bytes()
    got = run(PROGRAM, *SWEEP, "--workers", "1", cwd=tmp_path)
    assert got.returncode == 0, got.stderr
    assert sorted(x.split(":")[0] for x in got.stdout.splitlines()) == ["S1 seed 0"]
    assert rows(results) == ["E1", "S1"]
    assert (results / "E1-pocket-s0.json").read_bytes() == before
    again = run(PROGRAM, *SWEEP, cwd=tmp_path)
    assert (again.returncode, again.stdout) == (0, "")


def test_two_sweeps_at_once_do_not_collide(tmp_path):
    both = [start("--workers", "1", cwd=tmp_path) for _ in range(2)]
    texts = [p.communicate(timeout=240) for p in both]
    for (out, err), p in zip(texts, both):
        others = [x for x in out.splitlines() if "another process is working on this run" in x]
        assert p.returncode == (1 if others else 0), (out, err)
        assert all("another process" in x or "sst" in x for x in out.splitlines()), out
    assert rows(tmp_path / "results") == ["E1", "S1"]
    for path in (tmp_path / "runs").glob("*/metrics.jsonl"): # no step was trained by two
        steps = [json.loads(x)["step"] for x in open(path) if "loss_sst" in x]
        assert steps == sorted(set(steps))


def test_rows_named_twice_and_a_folder_with_a_file_called_queue(tmp_path):
    "Workers do not import from the folder that a sweep is started in."
    for name in ("queue.py", "json.py", "torch.py"):
        (tmp_path / name).write_text("raise SystemExit('a file of mine')")
    (tmp_path / "runs/S1-pocket-s0").mkdir(parents=True)
    (tmp_path / "runs/S1-pocket-s0/.config.json.x1y2z3").write_text("{") # left by a kill
    args = [x if x != "E1,S1" else "S1,S1" for x in SWEEP]
    got = run(PROGRAM, *args, "--seeds", "0,0", cwd=tmp_path)
    assert got.returncode == 0, (got.stdout, got.stderr)
    assert [x.split(":")[0] for x in got.stdout.splitlines()] == ["S1 seed 0"]
    assert rows(tmp_path / "results") == ["S1"]


def arguments(row, seed, run_dir):
    "The command of one run."
    return [PROGRAM, "run", row, "--seed", seed, "--preset", "pocket", "--data", "pocket",
            "--limit", "40", "--out", run_dir, "--resume"]


def kill_while_busy(pid, runs, killed):
    "Kill a worker as soon as every run has trained a few steps."
    deadline = time.monotonic() + 120
    while not all((r / "metrics.jsonl").exists() and len(trained(r)) > 5 for r in runs):
        if time.monotonic() > deadline:
            return
        time.sleep(.02)
    os.kill(pid, signal.SIGKILL)
    killed += [r for r in runs if not (r / "result.json").exists()]


def trained(run_dir):
    "The steps that were trained, in their order."
    lines = (run_dir / "metrics.jsonl").read_text().split("\n")[:-1]
    return [json.loads(x)["step"] for x in lines if "loss_" in x]


def test_two_workers_of_a_cluster_one_of_them_killed(tmp_path):
    "Its run goes to the other worker, once."
    distributed = pytest.importorskip("distributed")
    todo, killed = [("S1", 0), ("S3", 0)], []
    runs = [tmp_path / f"runs/{row}-pocket-s0" for row, _ in todo]
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1,
                                  dashboard_address=None) as cluster:
        pid = cluster.workers[0].pid
        killer = threading.Thread(target=kill_while_busy, args=(pid, runs, killed))
        killer.start()
        ended = list(sweep(todo, arguments, tmp_path / "results", tmp_path / "runs", 2,
                           cluster.scheduler_address, "pocket"))
        killer.join()
    assert sorted((row, error) for row, _, _, error in ended) == [("S1", ""), ("S3", "")]
    assert rows(tmp_path / "results") == ["S1", "S3"] and killed == runs
    for row, _, result, _ in ended:
        assert trained(tmp_path / f"runs/{row}-pocket-s0") == [*range(1, result["steps"] + 1)]


def test_what_a_sweep_cannot_do(fails, tmp_path):
    here = [*SWEEP[:-4], "--out", tmp_path / "runs", "--results", tmp_path / "results"]
    fails(r"seeds is 'a'", *here, "--seeds", "a")
    fails(r"unknown row 'E99'", "sweep", "--rows", "E99", "--data", "pocket")
    fails(r"workers is 0", *here, "--workers", "0")
    fails(r"format is 'pdf'", "table", "--format", "pdf")
    pytest.importorskip("distributed")
    fails(r"no Dask scheduler answers", *here, "--cluster", "tcp://127.0.0.1:9")


def test_runs_on_other_data_are_not_put_together(fails, tmp_path, data_dir):
    (tmp_path / "E1-pocket-s0.json").write_text(json.dumps(
        {"row": "E1", "seed": 0, "preset": "pocket", "data_fingerprint": "other", "dev": {}}))
    here = ["--out", tmp_path / "runs", "--results", tmp_path]
    fails(r"holds runs on other data", *SWEEP[:-4], *here)


def test_help_imports_no_torch():
    "Of any command; half a second of processor time for all of them together."
    code = """
import sys, time
from minbert.cli import commands, main
for name in ("", *commands):
    main([*name.split(), "--help"])
sys.exit(any(m in sys.modules for m in ("torch", "numpy", "pandas")) or time.process_time() > .5)
"""
    got = run(sys.executable, "-c", code)
    assert got.returncode == 0 and got.stdout.count("usage: minbert") > 12, got.stderr
