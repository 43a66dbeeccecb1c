"""Sweeps: stopped and started again, two at once, and handed to the workers of a cluster."""
import json, os, signal, subprocess, time

import pytest

from conftest import PROGRAM, run
from minbert.recipes import kept, sweep

SWEEP = ["sweep", "--rows", "E1,S1", "--preset", "pocket", "--data", "pocket"]


def start(*args, cwd):
    "A sweep in the background, in a group of its own."
    return subprocess.Popen([PROGRAM, *SWEEP, *args], cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_a_killed_sweep_goes_on_and_repeats_nothing(tmp_path):
    first = start("--workers", "1", cwd=tmp_path)
    results, state = tmp_path/"nbs/results", tmp_path/"runs/S1-pocket-s0/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (state.exists() and state.stat().st_size > 2000):                       # in the middle of the second run
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()
        time.sleep(.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert [r["row"] for r in kept(results)] == ["E1"]
    before = (results/"E1-pocket-s0.json").read_bytes()
    got = run(PROGRAM, *SWEEP, "--workers", "1", cwd=tmp_path)
    assert got.returncode == 0, got.stderr
    assert sorted(x.split(":")[0] for x in got.stdout.splitlines()) == ["S1 seed 0"]
    assert sorted(r["row"] for r in kept(results)) == ["E1", "S1"] and (results/"E1-pocket-s0.json").read_bytes() == before
    again = run(PROGRAM, *SWEEP, cwd=tmp_path)
    assert (again.returncode, again.stdout) == (0, "")


def test_two_sweeps_at_once_do_not_collide(tmp_path):
    both = [start("--workers", "1", cwd=tmp_path) for _ in range(2)]
    texts = [p.communicate(timeout=240) for p in both]
    for (out, err), p in zip(texts, both):
        others = [x for x in out.splitlines() if "another process is working on this run" in x]
        assert p.returncode == (1 if others else 0), (out, err)
        assert all("another process" in x or "sst" in x for x in out.splitlines()), out
    assert sorted(r["row"] for r in kept(tmp_path/"nbs/results")) == ["E1", "S1"]
    logs = [[json.loads(x)["step"] for x in open(p) if "loss_sst" in x] for p in (tmp_path/"runs").glob("*/metrics.jsonl")]
    assert all(steps == sorted(set(steps)) for steps in logs)                         # no step was trained by two


def test_two_workers_of_a_cluster(tmp_path):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        ended = list(sweep(["E1", "S2"], [0], "pocket", "pocket", tmp_path/"runs", tmp_path/"results", cluster=cluster.scheduler_address))
    assert sorted((row, error) for row, _, _, error in ended) == [("E1", ""), ("S2", "")]
    assert sorted(r["row"] for r in kept(tmp_path/"results")) == ["E1", "S2"]


def test_a_scheduler_that_is_not_there(fails, tmp_path):
    pytest.importorskip("distributed")
    fails(r"no Dask scheduler answers", *SWEEP, "--cluster", "tcp://127.0.0.1:9", "--results", tmp_path)
    fails(r"seeds is 'a'", "sweep", "--seeds", "a")
    fails(r"unknown row 'E99'", "sweep", "--rows", "E99", "--data", "pocket")
    fails(r"format is 'pdf'", "table", "--format", "pdf")
