"""Downloads, tried against a server here that also serves damaged, cut and missing files."""
import hashlib
import re
import socket
import time
from http.server import BaseHTTPRequestHandler

import pytest

import minbert.data as data
from conftest import is_one_line, serving
from minbert.cli import main
from minbert.core import UserError
from minbert.data import load_tasks
from minbert.files import digest, fetch


@pytest.fixture
def site(data_dir):
    "The data directory on the web: `how[name]` says how a file is served, `asked` what was asked."
    class Handler(BaseHTTPRequestHandler):
        how, asked = {}, []

        def do_GET(self):
            name = self.path.rsplit("/", 1)[-1]
            Handler.asked.append(name)
            how, path = Handler.how.get(name, "whole"), data_dir / name
            if how == "refused":
                return self.connection.shutdown(socket.SHUT_RDWR)
            if how == "error" or not path.is_file():
                return self.send_error(500 if how == "error" else 404)
            body = path.read_bytes()
            length = len(body)
            if how == "truncated":
                body = body[:length // 2]
                length = len(body)
            if how == "cut off": # promises more than it sends, then hangs up
                body = body[:length // 2]
            if how == "flipped":
                body = body[:100] + bytes([body[100] ^ 1]) + body[101:]
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = True

        def log_message(self, *args):
            "Say nothing."

    with serving(Handler) as url:
        Handler.url = url
        yield Handler


@pytest.fixture
def pins(data_dir):
    "The registry of the small files: SHA-256 for most, git's blob id for the paraphrase ones."
    found = {}
    for p in sorted(data_dir.glob("*.csv")):
        kind = "blob" if p.name.startswith("quora") else "sha256"
        found[p.name] = f"{kind}:{digest(p.read_bytes(), kind)}"
    return found


def files(folder):
    "Name → content of every file below a folder."
    if not folder.exists():
        return {}
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_whole_files_arrive_once(site, pins, data_dir, tmp_path):
    paths = fetch(tmp_path / "new" / "data", site.url, pins, progress=False)
    assert [p.name for p in paths] == list(pins) == site.asked
    assert files(tmp_path) == files(data_dir)
    fetch(tmp_path / "new" / "data", site.url, pins, progress=False)
    assert len(site.asked) == len(pins), "a second call fetches nothing"


def test_a_damaged_file_on_disk_is_fetched_again(site, pins, data_dir, tmp_path):
    fetch(tmp_path, site.url, pins, progress=False)
    (tmp_path / "sts-dev.csv").write_text("id\n")
    fetch(tmp_path, site.url, pins, progress=False)
    assert site.asked[len(pins):] == ["sts-dev.csv"] and files(tmp_path) == files(data_dir)


@pytest.mark.parametrize("name", ["sts-dev.csv", "quora-dev.csv"], ids=["sha256", "blob"])
@pytest.mark.parametrize("how", ["truncated", "flipped", "cut off", "refused", "error"])
def test_what_is_damaged_is_refused(how, name, site, pins, tmp_path):
    site.how[name] = how
    with pytest.raises(UserError) as e:
        fetch(tmp_path / "data", site.url, {name: pins[name]}, progress=False)
    said = str(e.value)
    assert name in said and "\n" not in said and len(said) < 400
    wanted = {"truncated": "damaged", "flipped": "damaged", "cut off": "damaged|cannot download"}
    assert re.search(wanted.get(how, "cannot download"), said), said
    assert not files(tmp_path)
    del site.how[name]
    fetch(tmp_path / "data", site.url, {name: pins[name]}, progress=False)
    assert list(files(tmp_path)) == [name], "and the next try works"


def test_a_damaged_download_leaves_the_older_file_alone(site, pins, tmp_path):
    (tmp_path / "sts-dev.csv").write_text("an older file\n")
    site.how["sts-dev.csv"] = "flipped"
    with pytest.raises(UserError):
        fetch(tmp_path, site.url, {"sts-dev.csv": pins["sts-dev.csv"]}, progress=False)
    assert files(tmp_path) == {"sts-dev.csv": b"an older file\n"}


def test_no_server_and_no_such_file(site, pins, tmp_path):
    pin = pins["sts-dev.csv"]
    with pytest.raises(UserError, match="cannot download"):
        fetch(tmp_path, site.url, {"other.csv": pin}, progress=False)
    with pytest.raises(UserError, match="cannot download"):
        fetch(tmp_path, "http://127.0.0.1:9/", {"sts-dev.csv": pin}, progress=False)
    assert not files(tmp_path)


def test_a_server_that_is_silent_costs_five_seconds(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:              # accepts, and says nothing
        url, began = f"http://127.0.0.1:{silent.getsockname()[1]}/", time.monotonic()
        with pytest.raises(UserError, match=r"cannot download .*sts-dev\.csv"):
            fetch(tmp_path, url, {"sts-dev.csv": "sha256:0", "sts-train.csv": "sha256:0"})
    assert time.monotonic() - began < 6.5
    assert not files(tmp_path)


def test_a_folder_that_cannot_be_made(site, pins, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot make"):
        fetch(tmp_path / "file", site.url, pins, progress=False)
    assert files(tmp_path) == {"file": b"mine"}


def test_progress_is_shown(site, pins, tmp_path, capsys):
    fetch(tmp_path, site.url, {"sts-dev.csv": pins["sts-dev.csv"]})
    assert "100%" in capsys.readouterr().err


def test_blob_pins_are_gits_object_ids(data_dir, pins):
    body = (data_dir / "quora-dev.csv").read_bytes()
    own = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
    assert pins["quora-dev.csv"] == f"blob:{own}"
    assert digest(b"", "blob") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391" # git's empty blob


@pytest.fixture
def bare(monkeypatch, tmp_path, site, pins):
    "A machine without data, whose published address is the local server."
    monkeypatch.delenv("MINBERT_DATA", raising=False)
    monkeypatch.setattr(data, "checkouts", lambda: [])
    monkeypatch.setattr(data, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(data, "registry", pins)
    monkeypatch.setattr(data, "published", site.url)
    return tmp_path / "cache"


def test_a_machine_without_data_downloads_them_once(bare, site, capsys):
    corpus = load_tasks()
    assert corpus.name == "handout" and len(corpus["sts"]["dev"]) == 126
    assert len(site.asked) == 9
    assert load_tasks().fingerprint == corpus.fingerprint and len(site.asked) == 9
    assert main(["data"]) == 0 and corpus.fingerprint in capsys.readouterr().out


def test_the_pocket_corpus_never_slips_in(bare, site, tmp_path, capsys, caplog):
    site.how["ids-sst-dev.csv"] = "flipped"
    assert main(["run", "S1", "--preset", "pocket", "--out", str(tmp_path / "run")]) == 1
    is_one_line(capsys.readouterr().err, "ids-sst-dev.csv: the download is damaged")
    assert not (tmp_path / "run").exists() and "ids-sst-dev.csv" not in files(bare)
    assert load_tasks(fallback="pocket").name == "pocket"
    assert "pocket corpus" in capsys.readouterr().err + caplog.text
