"""TensorBoard's own reader finds in the event files what the run has logged."""
import json
import signal
import subprocess
import sys
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import run
from minbert.cli import main
from minbert.runs import RunDir

PROGRAM = "import sys; from minbert.cli import main; sys.exit(main())"


def events(folder):
    "Tag → list of (step, value, time), and the config's text."
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    scalars = {t: [(e.step, e.value, e.wall_time) for e in found.Scalars(t)]
               for t in found.Tags()["scalars"]}
    text = found.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    return scalars, text


@pytest.fixture
def my_run(tmp_path):
    "A run as the harness leaves it before its end."
    made = RunDir(tmp_path / "runs" / "one")
    made.start({"row": "E1", "train": {"steps": 4}})
    made.log(step=0, seconds=0., dev_a=.25, dev_overall=.25)
    for step in (1, 2):
        made.log(step=step, lr=.5 / step, loss_a=1 / step, smart={"a": .125})
    return made


def test_what_a_finished_run_logged(run_dir, capsys):
    assert main(["tensorboard", str(run_dir)]) == 0
    assert f"tensorboard --logdir {run_dir}" in capsys.readouterr().err
    scalars, text = events(run_dir)
    log = RunDir(run_dir).lines()
    assert {"lr", "loss/sst", "loss/para", "loss/sts", "dev/sst", "dev/sts", "dev/overall"} <= set(scalars)
    for name in ("lr", "loss_sst", "dev_sts"):
        logged = [(x["step"], x[name]) for x in log if name in x]
        read = [(step, value) for step, value, _ in scalars[name.replace("_", "/")]]
        assert len(read) > 1 and [s for s, _ in read] == [s for s, _ in logged]
        assert [v for _, v in read] == pytest.approx([v for _, v in logged])
    lasted = scalars["dev/sts"][-1][2] - scalars["dev/sts"][0][2]
    looks = [x["seconds"] for x in log if "seconds" in x]
    assert lasted == pytest.approx(looks[-1] - looks[0], abs=1e-3)
    config = json.loads((run_dir / "config.json").read_text())
    assert json.loads(text) == config and text.startswith("    {")


def test_a_second_call_replaces_the_first(my_run):
    for _ in range(2):
        assert main(["tensorboard", str(my_run.path.parent)]) == 0
    assert len([*my_run.path.glob("events.out.*")]) == 1
    scalars, _ = events(my_run.path)
    assert [x[:2] for x in scalars["loss/a"]] == [(1, 1.), (2, .5)]
    assert [x[1] for x in scalars["smart/a"]] == [.125, .125]


def wait_for(condition):
    "Until it holds; half a minute at most."
    for _ in range(300):
        if condition():
            return
        time.sleep(.1)
    raise AssertionError("waited in vain")


def steps(path, tag="loss/a"):
    "Steps of a tag, if there are any yet."
    if not [*path.glob("events.out.*")]:
        return []
    try:
        return [s for s, *_ in events(path)[0].get(tag, [])]
    except (KeyError, FileNotFoundError):       # the file is being made
        return []


def hear():
    "Listen to Ctrl-C, which a job in the background ignores."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_following(my_run, tmp_path):
    "New lines, a second run, a run that was rewound; Ctrl-C is the way out."
    call = [sys.executable, "-c", PROGRAM, "tensorboard", str(tmp_path / "runs"), "--follow"]
    with subprocess.Popen(call, stderr=subprocess.PIPE, text=True, preexec_fn=hear) as p:
        try:
            wait_for(lambda: steps(my_run.path) == [1, 2])
            my_run.log(step=3, loss_a=.3)
            wait_for(lambda: steps(my_run.path) == [1, 2, 3])
            my_run.rewind(1)
            my_run.log(step=2, loss_a=.4)
            wait_for(lambda: steps(my_run.path) == [1, 2])
            second = RunDir(tmp_path / "runs" / "two")
            second.start({"row": "E2"})
            second.log(step=1, loss_a=1.)
            second.write("result.json", {"dev": {}})
            wait_for(lambda: steps(second.path) == [1])
            assert p.poll() is None
        finally:
            p.send_signal(signal.SIGINT)
        try:
            said = p.communicate(timeout=60)[1]
        finally:
            p.kill()
    assert p.returncode == 0 and "Traceback" not in said, said
    assert "following until Ctrl-C" in said and len(said.splitlines()) == 1
    assert events(my_run.path)[0]["loss/a"][-1][1] == pytest.approx(.4)


def test_one_line_where_it_cannot_be(my_run, tmp_path, fails):
    fails("no run directory, and no folder of them", "tensorboard", tmp_path / "nowhere")
    fails("no run directory, and no folder of them", "tensorboard", tmp_path)
    for damage in ('{"step": 3, "seconds": "x"}', '{"loss_a": 1}', '{"step": "x"}', "[3]"):
        kept = (my_run.path / "metrics.jsonl").read_text()
        (my_run.path / "metrics.jsonl").write_text(kept + damage + "\n")
        fails("metrics.jsonl.* damaged", "tensorboard", my_run.path)
        (my_run.path / "metrics.jsonl").write_text(kept)
    (my_run.path / "config.json").unlink()
    fails("config.json", "tensorboard", my_run.path)


def test_one_line_without_the_extra(my_run):
    hidden = "import sys; sys.modules['tensorboard'] = None; " + PROGRAM
    got = run(sys.executable, "-c", hidden, "tensorboard", my_run.path)
    assert (got.returncode, got.stderr) == (
        1, "minbert: event files need TensorBoard: pip install tensorboard\n")
    assert not [*my_run.path.glob("events.out.*")]
