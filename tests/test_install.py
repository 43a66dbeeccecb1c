"""What pip installs: the sdist is whole, its wheel brings the pocket corpus, and any directory will do."""
import sys
import tarfile
import zipfile

import pytest

from conftest import PROGRAM, ROOT, run
from minbert.data import load_tasks

BACKEND = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


def build(what, source, place):
    "Build with setuptools alone, without the network; the one file that this makes."
    place.mkdir()
    got = run(sys.executable, "-P", "-c", BACKEND, f"build_{what}", place, cwd=source)
    assert got.returncode == 0, got.stderr
    path, = place.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    "The wheel that is built from the sdist of a fresh copy, as pip does it."
    work = tmp_path_factory.mktemp("build")
    with tarfile.open(build("sdist", checkout(), work / "sdist")) as packed:
        packed.extractall(work / "source", filter="data")
    source, = (work / "source").iterdir()
    return build("wheel", source, work / "wheel")


def test_the_wheel_holds_what_the_package_needs(wheel):
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
        entry = next(n for n in names if n.endswith("entry_points.txt"))
        assert "minbert = minbert.cli:main" in packed.read(entry).decode()
        facts = packed.read(entry.replace("entry_points.txt", "METADATA")).decode()
        assert 'Requires-Dist: tensorboard>=2.14; extra == "tensorboard"' in facts
    here = {str(p.relative_to(ROOT)) for p in (ROOT / "minbert").rglob("*") if p.is_file()}
    assert {n for n in here if not n.endswith(".pyc")} <= names
    assert not [n for n in names if n.startswith(("nbs/", "tests/"))]


def test_a_wheel_works_from_any_directory(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path / "site")
    call = "import minbert, sys; from minbert.cli import main; print(minbert.__file__); main(sys.argv[1:])"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for args in (["data", "pocket"], ["recipes"], ["--help"]):
        got = run(sys.executable, "-P", "-c", call, *args, cwd=elsewhere, MINBERT_DATA=None,
                  PYTHONPATH=str(tmp_path / "site"))
        assert got.returncode == 0 and got.stdout.startswith(str(tmp_path / "site")), got.stderr
        assert args[0] != "data" or load_tasks("pocket").fingerprint in got.stdout
    assert not list(elsewhere.iterdir())


def test_the_program_of_a_checkout_works_from_any_directory(tmp_path):
    got = run(PROGRAM, "data", "pocket", cwd=tmp_path, MINBERT_DATA=None)
    assert got.returncode == 0 and load_tasks("pocket").fingerprint in got.stdout, got.stderr
    assert not list(tmp_path.iterdir())
