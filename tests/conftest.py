"""What the tests share: the program, small data, a trained run, copies, a web server."""
import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1" # before torch is imported: equal bits need equal threads

import pytest
import torch

from away import away # noqa: F401 (a fixture)
from minbert.bert import BertModel
from minbert.cli import main

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
PROGRAM = Path(sys.executable).with_name("minbert")

torch.set_num_threads(1) # the models here are tiny


def run(*args, timeout=120, cwd=None, preexec=None, **env):
    "Run a command in a process of its own; an environment variable that is None is unset."
    full = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **env}
    full = {k: v for k, v in full.items() if v is not None}
    return subprocess.run([str(a) for a in args], capture_output=True, encoding="utf-8",
                          errors="replace", timeout=timeout, cwd=cwd, env=full,
                          preexec_fn=preexec, stdin=subprocess.DEVNULL)


progress = re.compile(r"\s*(training|evaluating|predicting|sweep): +\d|\s*\d+%\|| *[\d.]+k?B? \[")


def plain(err):
    "The lines of a standard error output, without progress bars and the demo's first line."
    lines = [x for x in re.split(r"[\r\n]+", err) if x.strip()]
    return [x for x in lines if not progress.match(x) and not x.startswith("data: ")]


def is_one_line(err, words):
    "Standard error is one plain line of the program that says these words."
    lines = plain(err)
    assert len(lines) == 1 and lines[0].startswith("minbert: ") and "Traceback" not in err, err
    assert re.search(words, lines[0]), lines[0]


@pytest.fixture
def fails(capsys):
    "Call the program in this process; it must end with exit code 1 and one plain line."
    def check(words, *args):
        capsys.readouterr()
        assert main([str(a) for a in args]) == 1
        is_one_line(capsys.readouterr().err, words)
    return check


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    "The pocket corpus as the handout's files."
    pocket = ROOT / "minbert" / "pocket"
    return shutil.copytree(pocket, tmp_path_factory.mktemp("data") / "pocket")


@pytest.fixture
def my_data(data_dir, tmp_path):
    "A copy of the data directory that a test may break."
    return shutil.copytree(data_dir, tmp_path / "data")


@pytest.fixture(scope="session")
def pocket_dir(tmp_path_factory):
    "The pocket BERT as a directory."
    folder = tmp_path_factory.mktemp("weights") / "pocket"
    BertModel.from_pretrained("pocket").save_pretrained(folder)
    return folder


@pytest.fixture
def my_weights(pocket_dir, tmp_path):
    "A copy of it that a test may break."
    return shutil.copytree(pocket_dir, tmp_path / "weights")


@pytest.fixture(scope="session")
def run_dir(data_dir, tmp_path_factory):
    "A finished run, a few steps long."
    out = tmp_path_factory.mktemp("runs") / "E9"
    assert main(["run", "E9", "--preset", "pocket", "--data", str(data_dir), "--out", str(out),
                 "--epochs", ".1"]) == 0
    return out


def leftovers(folder):
    "Files and folders that a write left unfinished."
    return [str(p) for p in Path(folder).rglob(".*")] if Path(folder).exists() else []


made = (".git", ".hypothesis", ".venv", "venv", "__pycache__", "*.egg-info", "_proc", "_docs",
        ".quarto", "data", "runs", "nbdev.yml", "sidebar.yml", ".ipynb_checkpoints",
        ".pytest_cache", "build", "dist")


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    "A function that copies the checkout's own files, without outputs, data or git."
    def copy(name="checkout"):
        place = tmp_path_factory.mktemp(name) / "minbert"
        return shutil.copytree(ROOT, place, symlinks=True, ignore=shutil.ignore_patterns(*made))
    return copy


@contextlib.contextmanager
def serving(handler):
    "A web server on this machine; gives its address."
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": .05},
                              daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
