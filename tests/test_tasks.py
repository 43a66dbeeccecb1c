"""Anyone's own tasks through the command line: from a task file to predictions by label name."""
import csv
import json
import random
import re
import signal
import subprocess

import pytest

from conftest import PROGRAM, ROOT, leftovers
from minbert import files
from minbert.bert import BertModel
from minbert.cli import main
from minbert.data import floors, load_tasks
from minbert.files import Task
from minbert.heads import MultitaskBert, encoder_floor, head_for
from minbert.runs import RunDir
from test_kill import eager, hear_ctrl_c, kill_after, lines, same

TOPICS = {"sport": "goal match team race coach".split(),
          "money": "bank rate share price market".split(),
          "science": "comet cell fossil laser genome".split()}
quick = ["--init", "pocket", "--device", "cpu"]


def headlines(n, seed=0, topics=TOPICS):
    "Sentences, each with a word that gives its topic away."
    r = random.Random(seed)
    for i in range(n):
        topic = list(topics)[i % len(topics)]
        yield f"the {r.choice(topics[topic])} of {r.choice('may june july'.split())} {i} .", topic


def likeness(n, seed=0):
    "Pairs of sentences, scored by the words that they share, from -1 to 3."
    r = random.Random(seed)
    words = "dog cat man boy park town hill lake".split()
    for _ in range(n):
        a, b = (r.sample(words, 4) for _ in range(2))
        yield f"the {' '.join(a)} .", f"the {' '.join(b)} .", len({*a} & {*b}) - 1


def write(path, header, rows, delimiter=","):
    "A table."
    with open(path, "w", newline="", encoding="utf-8") as f:
        w = csv.writer(f, delimiter=delimiter)
        w.writerow(header)
        w.writerows(rows)


def task_file(folder, **tasks):
    "A TOML file with these tables; texts are quoted, lists and numbers are not."
    text = ""
    for name, entries in tasks.items():
        text += f"[tasks.{name}]\n"
        for key, value in entries.items():
            text += f"{key} = {json.dumps(value)}\n"
    (folder / "tasks.toml").write_text(text)
    return folder / "tasks.toml"


@pytest.fixture
def topic(tmp_path):
    "Headlines with topics for names: commas, no ids, dev is a file of its own."
    write(tmp_path / "topics.csv", ("title", "topic"), headlines(60))
    write(tmp_path / "topics-dev.csv", ("title", "topic"), headlines(18, 1))
    return {"text": ["title"], "label": "topic", "train": "topics.csv", "dev": "topics-dev.csv",
            "batch_size": 8}


@pytest.fixture
def alike(tmp_path):
    "Pairs with a score from -1 to 3: tabs, ids, dev is a share of train."
    rows = [(f"p{i}", *x) for i, x in enumerate(likeness(60))]
    write(tmp_path / "pairs.tsv", ("id", "one", "two", "score"), rows, "\t")
    return {"kind": "score", "range": [-1, 3], "text": ["one", "two"], "label": "score",
            "train": "pairs.tsv", "dev": .3, "batch_size": 8}


def trained(tasks, out, *more):
    "What a run of the program leaves."
    assert main(["train", str(tasks), "--out", str(out), *quick, *more]) == 0
    return json.loads((out / "result.json").read_text())


def predicted(out, task, source, tmp_path):
    "The answers to a file."
    target = tmp_path / "answers.csv"
    assert main(["predict", str(out), task, str(source), str(target)]) == 0
    with open(target, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def test_one_task_with_names_for_labels(topic, tmp_path, capsys):
    "Trains above its floor, scores a file, and answers with names."
    tasks, out = task_file(tmp_path, topic=topic), tmp_path / "run"
    got = trained(tasks, out, "--epochs", "40")
    assert got["dev"]["topic"] > .6 and got["dev"]["overall"] == got["dev"]["topic"]
    assert 0 <= got["dev"]["topic_f1"] <= 1 and got["train"]["topic"] > .6
    steps = got["steps"]
    assert got["examples"] == {"topic": RunDir(out).result()["examples"]["topic"]}
    assert steps * 8 * .9 < got["examples"]["topic"] <= steps * 8
    capsys.readouterr()
    for more in ([], ["--data", str(tasks)], [str(tmp_path / "topics-dev.csv")]):
        assert main(["evaluate", str(out), *more]) == 0
        said = capsys.readouterr()
        assert ("note: scored on" in said.err) == (not more), said.err # what a run leads to is told
        scores = json.loads(said.out)
        assert abs(scores["topic"] - got["dev"]["topic"]) < 1e-5
    config = out / "config.json"
    kept = config.read_text()
    for place in (5, None, ["a"], "x\0.toml", "/dev/zero", "a" * 5000 + ".toml", str(tmp_path)):
        config.write_text(json.dumps({**json.loads(kept), "data": place}))
        assert main(["evaluate", str(out)]) == 1, place
        assert len(capsys.readouterr().err.splitlines()) == 1, place
    config.write_text(kept)
    tasks.rename(tmp_path / "elsewhere.toml") # a run says where its task file was
    assert main(["evaluate", str(out)]) == 1
    assert "name it with --data" in capsys.readouterr().err
    answers = predicted(out, "topic", tmp_path / "topics-dev.csv", tmp_path)
    truth = [topic for _, topic in headlines(18, 1)]
    right = sum(a["prediction"] == t for a, t in zip(answers, truth, strict=True))
    assert abs(right / 18 - got["dev"]["topic"]) < 1e-5
    assert [a["id"] for a in answers] == [str(i + 1) for i in range(18)]
    with open(out / "dev-topic.csv", newline="") as f:
        assert [x["prediction"] for x in csv.DictReader(f)] == [a["prediction"] for a in answers]
    model = MultitaskBert.from_pretrained(out)
    assert model.predict("topic", ["the fossil of may 1 ."])[0] in TOPICS
    assert model.predict("topic", ["a", "b"], probabilities=True).shape == (2, 3)
    assert main(["predict", str(out), "topic", str(tmp_path / "topics-dev.csv"),
                 str(tmp_path / "p.csv"), "--probabilities"]) == 0
    with open(tmp_path / "p.csv", newline="", encoding="utf-8") as f:
        table = list(csv.DictReader(f))
    assert [(x["id"], x["prediction"]) for x in table] == [(x["id"], x["prediction"]) for x in answers]
    for x in table:
        p = {label: float(x[f"p_{label}"]) for label in TOPICS}
        assert abs(sum(p.values()) - 1) < 1e-5 and max(p, key=p.get) == x["prediction"]


def floor_scores(corpus):
    "Task → floor → score."
    return {t: column.dropna().to_dict() for t, column in floors(corpus).items()}


def test_a_test_file_is_answered_and_a_card_is_written(topic, alike, tmp_path, capsys):
    "Rows without labels, as predict answers them; the card holds the scores and stays."
    write(tmp_path / "new.csv", ("title",), [(text,) for text, _ in headlines(7, 2)])
    tasks = task_file(tmp_path, topic={**topic, "test": "new.csv"}, alike=alike)
    got = trained(tasks, tmp_path / "run", "--epochs", "2")
    answers = predicted(tmp_path / "run", "topic", tmp_path / "new.csv", tmp_path)
    assert len(answers) == 7 and not (tmp_path / "run" / "test-alike.csv").exists()
    written = (tmp_path / "run" / "test-topic.csv").read_text()
    assert written == (tmp_path / "answers.csv").read_text()
    told = capsys.readouterr().err
    best_of = floor_scores(load_tasks(tasks))
    best_of["alike"] |= encoder_floor(BertModel.from_pretrained("pocket"), load_tasks(tasks))
    card = tmp_path / "run" / "model" / "README.md"
    for task, scores in best_of.items():
        best = max(scores.values())
        assert f"{got['dev'][task]:.3f} | {best:.3f} |" in card.read_text()
        assert (f"{task}: " in told) == (got["dev"][task] <= best)
    assert f"accuracy {got['dev']['topic']:.3f}" in card.read_text()
    card.write_text("mine")
    (tmp_path / "run" / "test-topic.csv").unlink()
    trained(tasks, tmp_path / "run", "--epochs", "2", "--resume")
    assert card.read_text() == "mine"
    assert (tmp_path / "run" / "test-topic.csv").read_text() == written


def test_a_pair_with_a_score_on_another_range(alike, tmp_path):
    "Answers stay in the range; dev is a share of train by its texts, the same each time."
    tasks, out = task_file(tmp_path, alike=alike), tmp_path / "run"
    corpus = load_tasks(tasks)
    train, dev = (set(corpus["alike"][s].texts) for s in ("train", "dev"))
    assert train and dev and not train & dev and len(train | dev) == 60
    got = trained(tasks, out, "--epochs", "3")
    assert got["data_fingerprint"] == corpus.fingerprint
    assert set(got["dev"]) == {"alike", "overall", "overall_raw"}
    assert abs(got["dev"]["overall"] - (got["dev"]["alike"] + 1) / 2) < 1e-5
    answers = predicted(out, "alike", tmp_path / "pairs.tsv", tmp_path)
    assert [a["id"] for a in answers] == [f"p{i}" for i in range(60)]
    assert all(-1 <= float(a["prediction"]) <= 3 for a in answers)


shapes = {"2 classes": {"yes": ["good", "great"], "no": ["bad", "awful"]},
          "7 classes": {f"day {i}": [word] for i, word in enumerate(
              "monday tuesday wednesday thursday friday saturday sunday".split())},
          "numbers": {"-1": ["bad"], "0": ["plain"], "1": ["good"]},
          "odd names": {"ja, sicher": ["good"], 'said "no"': ["bad"], "naïve": ["plain"]}}


@pytest.mark.parametrize("name", shapes)
def test_labels_of_every_kind(name, tmp_path):
    "What stands in the label column is what the model answers, and numbers stay numbers."
    topics = shapes[name]
    write(tmp_path / "a.csv", ("text", "label"), headlines(70, 0, topics), ";")
    got = trained(task_file(tmp_path, a={"train": "a.csv", "dev": "a.csv"}), tmp_path / "run",
                  "--epochs", "1")
    assert 0 <= got["dev"]["a"] <= 1
    answers = predicted(tmp_path / "run", "a", tmp_path / "a.csv", tmp_path)
    assert {a["prediction"] for a in answers} <= set(topics)
    model = MultitaskBert.from_pretrained(tmp_path / "run")
    assert model.configs["a"].task.n_outputs == (1 if len(topics) == 2 else len(topics))
    legal = {-1, 0, 1} if name == "numbers" else set(topics)
    assert set(model.predict("a", ["good", "bad"])) <= legal


def test_five_tasks_and_every_method(topic, alike, tmp_path):
    "Names of the handout mean nothing here; a step has a batch of each task."
    write(tmp_path / "two.csv", ("text", "label"), headlines(40, 0, shapes["2 classes"]))
    two = {"train": "two.csv", "dev": .25, "labels": ["no", "yes"], "batch_size": 4}
    tasks = task_file(tmp_path, topic=topic, alike={**alike, "head": "cosine"}, sst=two,
                      para={**two, "loss": "mse"}, sts={**alike, "head": "concat_diff"})
    got = trained(tasks, tmp_path / "run", "--epochs", ".3", "--method", "pcgrad", "--smart", "1")
    assert set(got["examples"]) == {"topic", "alike", "sst", "para", "sts"}
    assert [p["name"] for p in got["plugs"]] == ["Surgery", "Smart"]
    assert got["examples"]["sst"] == 4 * got["steps"]
    model = MultitaskBert.from_pretrained(tmp_path / "run")
    assert model.predict("sst", ["good"])[0] in ("yes", "no")
    for mixing in ("round_robin", "summed", "proportional"):
        got = trained(tasks, tmp_path / mixing, "--epochs", ".1", "--mixing", mixing)
        assert got["steps"] >= 1


def test_two_unrelated_tasks_are_killed_and_go_on(topic, alike, tmp_path, capsys):
    "Trained, killed, resumed to the same bits, evaluated, and asked."
    tasks = task_file(tmp_path, topic=topic, alike=alike)
    more = ["--epochs", "4", "--method", "pcgrad"]
    whole = tmp_path / "whole"
    trained(tasks, whole, *more)
    out = tmp_path / "run"
    state = out / "state" / "last.safetensors"
    call = ["train", str(tasks), "--out", str(out), *quick, *more, "--resume"]
    process = subprocess.Popen([str(PROGRAM.with_name("python")), "-c", eager.replace("{}", ""),
                                *call], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, preexec_fn=hear_ctrl_c)
    kill_after(process, lambda: state.exists() and lines(out) > 6)
    assert process.returncode == -signal.SIGKILL and not (out / "result.json").exists()
    trained(tasks, out, *more, "--resume")
    same(out, whole)
    assert not leftovers(out)
    capsys.readouterr()
    assert main(["evaluate", str(out), "--data", str(tasks)]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert {"topic", "topic_f1", "alike", "overall", "overall_raw"} == set(scores)
    assert {a["prediction"] for a in predicted(out, "topic", tmp_path / "topics.csv", tmp_path)} \
        <= set(TOPICS)
    assert main(["train", str(tasks), "--out", str(out), *quick, "--epochs", "5", "--resume"]) == 1
    assert "cannot resume" in capsys.readouterr().err


def test_reading_the_texts_of_own_tasks(topic, alike, tmp_path):
    "Pretraining on own texts ends in a BERT that own tasks start from."
    tasks = task_file(tmp_path, topic=topic, alike=alike)
    assert main(["pretrain", "mlm", str(tmp_path / "read"), "--preset", "pocket", "--steps", "3",
                 "--init", "pocket", "--data", str(tasks)]) == 0
    got = json.loads((tmp_path / "read" / "result.json").read_text())
    assert got["data_sets"] == ["alike", "topic"]
    args = ["train", str(tasks), "--out", str(tmp_path / "run"), "--epochs", ".2"]
    assert main([*args, "--init", str(tmp_path / "read" / "model")]) == 0


def test_the_data_command_shows_own_tasks(topic, alike, tmp_path, capsys):
    "Files, floors and a fingerprint that covers every file of every task."
    tasks = task_file(tmp_path, topic=topic, alike=alike)
    prints = set()
    for _ in range(2):
        assert main(["data", str(tasks)]) == 0
        out = capsys.readouterr().out
        for word in ("topics.csv", "pairs.tsv", "majority", "topic", "alike"):
            assert word in out
        prints.add(out.splitlines()[-1])
        with open(tmp_path / "topics-dev.csv", "a", newline="") as f:
            csv.writer(f).writerow(["one more goal .", "sport"])
    assert len(prints) == 2


wrong = {
    "no such file": ({"train": "none.csv"}, r"none\.csv: No such file"),
    "no such column": ({"label": "mood"}, r"no column 'mood'"),
    "an unknown key": ({"epochs": 3}, r"unknown key 'epochs'"),
    "an unknown kind": ({"kind": "rank"}, r"kind is 'rank'"),
    "a label that is none": ({"labels": ["sport", "money"]}, r"'science', not one of"),
    "names with a range": ({"kind": "score", "range": [0, 1]}, r"not a number"),
    "a range that falls": ({"kind": "score", "range": [1, 0]}, r"range is two rising numbers"),
    "no dev": ({"dev": ""}, r"lacks dev"),
    "a share of all": ({"dev": 1.0}, r"between 0 and 1"),
    "no rows in a batch": ({"batch_size": 0}, r"batch_size is 0"),
    "a head for one text": ({"head": "cosine"}, r"head is for pairs"),
    "a loss that does not fit": ({"loss": "mse"}, r"loss is 'mse'"),
    "three texts": ({"text": ["title", "topic", "id"]}, r"text is one column, or two"),
}


@pytest.mark.parametrize("name", wrong)
def test_a_task_file_that_is_wrong(name, topic, tmp_path, fails):
    change, words = wrong[name]
    tasks = task_file(tmp_path, topic={**topic, **change})
    fails(words, "train", tasks, "--out", tmp_path / "run", *quick)
    assert not (tmp_path / "run").exists()


def test_a_call_that_is_wrong(topic, tmp_path, fails):
    tasks, out = task_file(tmp_path, topic=topic), tmp_path / "run"
    calls = {"method is 'magic'": ["--method", "magic"], "smart is -1": ["--smart=-1"],
             "mixing is 'stirred'": ["--mixing", "stirred"],
             "batch of every task": ["--method", "mgda", "--mixing", "round_robin"]}
    for words, more in calls.items():
        fails(words, "train", tasks, "--out", out, *quick, *more)
    fails(r"topics\.csv is a table", "train", tmp_path / "topics.csv")
    fails(r"nowhere\.toml", "train", tmp_path / "nowhere.toml", "--out", out)
    (tmp_path / "bad.toml").write_text("[tasks.topic\n")
    fails(r"not readable TOML", "train", tmp_path / "bad.toml", "--out", out)
    (tmp_path / "bad.toml").write_text("title = 3\n")
    fails(r"tables called \[tasks\.NAME\]", "train", tmp_path / "bad.toml", "--out", out)
    assert not out.exists()


def test_the_chapter_lists_every_key_and_its_default():
    text = (ROOT / "nbs" / "16_your_tasks.ipynb").read_text(encoding="utf-8")
    source = "".join(x for c in json.loads(text)["cells"] for x in c["source"])
    table = dict(re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", source, re.M))
    assert tuple(table) == files._keys
    record = Task("a")
    for key, told in table.items():
        if told.startswith("`") and key != "head":          # empty there: by the kind of task
            assert json.loads(told.strip("`")) == json.loads(json.dumps(getattr(record, key))), key
    assert int(table["batch_size"]) == record.batch_size and head_for(
        Task("a", "score", text=("b", "c"))).pairs == json.loads(table["head"].strip("`"))


def test_a_log_file_is_told_at_each_look(tmp_path, capsys, monkeypatch):
    "No bar, but how far, how good, and how long it still takes; nothing where bars are switched off."
    argv = ["run", "E9", "--preset", "pocket", "--data", "pocket", "--epochs", ".1", "--out"]
    for name, off, told in (("a", "", 2), ("b", "1", 0)):
        monkeypatch.setenv("TQDM_DISABLE", off)
        assert main([*argv, str(tmp_path / name)]) == 0
        err = capsys.readouterr().err
        looks = re.findall(r"^training: (\d+) of (\d+) steps, overall 0\.\d+ on dev, about .+ left$", err, re.M)
        assert len(looks) == told and "%|" not in err, err
        assert not told or looks[-1][0] == looks[-1][1]
