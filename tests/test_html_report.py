"""What report.html holds, for every kind of run; that it needs nothing else; the films in it."""

import base64
import html
import json
import math
import os
import re
import shutil
import subprocess
import time
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import imageio.v2 as imageio
import numpy as np
import pytest
from scripted import answer, begin_round, counted, plan, publish, requests, worker_starter
from test_lanes import many
from test_lanes import plan as script
from test_summary import SPANS, a_run, full, line

import films
import html_report
from config import Config
from evaluation import EvaluationLanes
from metrics import wilson
from run_folder import RunFolder, write_trace

TASKS = ("push", "reach", "dunk")


class Page(HTMLParser):
    """A report as a browser reads it."""

    def __init__(self, file: Path):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))
        assert self.open == [], "a tag is not closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def refreshes(self) -> bool:
        return any("http-equiv" in meta for meta in self.all("meta"))


def read(run: Path) -> Page:
    """Checks that a report needs nothing but itself, and that what it holds can be shown."""
    page = Page(run / "report.html")
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "embed"})
    style = (run / "report.html").read_text().split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), attributes
        assert not attributes.keys() & {"href", "srcset", "poster", "action", "background"}
        if "src" in attributes:
            kind, content = re.fullmatch(r"data:(.+);base64,(.+)", attributes["src"]).groups()
            shown = base64.b64decode(content, validate=True)
            assert kind == {"img": "image/png", "video": "video/mp4"}[tag]
            pictures = imageio.mimread(shown, kind[-3:], memtest=False)
            assert pictures and min(pictures[0].shape[:2]) >= 200
    assert all(image["alt"] for image in page.all("img"))
    assert all(video["aria-label"] and "muted" in video for video in page.all("video"))
    return page


def evaluated(number: int, rates: dict[str, float], episodes: int, version: int, **more) -> dict:
    news = {"eval_per_task": rates, "eval_episodes": episodes, "eval_version": version}
    return line(number, **news, eval_success_rate=sum(rates.values()) / len(rates), **more)


def played(number: int, **more) -> dict:
    rates = {"success_push": 0.75, "success_reach": 0.0}
    counts = {"episodes_per_task": {"push": 4, "reach": 3, "dunk": 0}}
    return line(number, **rates, **counts, staleness_mean=0.5, staleness_max=1, **more)


def note(run: Path, **more) -> None:
    (run / "about.json").write_text(json.dumps({"commands": ["python train.py"]} | more))


def film(folder: Path, task: str, version: int, won: bool = True, size: int = 64) -> None:
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(version)
    camera = films.Camera(None, task, version, 90)
    camera.look = lambda step: None
    camera.frames = list(random.integers(0, 255, (8, size, size, 3), dtype=np.uint8))
    camera.leave(folder, won)


# ---------------------------------------------------------------- the page


def test_the_report_of_a_run_that_is_done(tmp_path):
    first = evaluated(1, {"push": 0.0, "reach": 1.0, "dunk": 0.5}, 7, 0)
    last = evaluated(3, {"push": 1.0, "reach": 0.5, "dunk": 0.5}, 7, 3) | played(3)
    run = a_run(tmp_path / "x", [first, played(2, clip_fraction=0.9), last])
    note(run, ended="3 iterations done", status=0, where="no GPU", versions={"torch": "2"})
    html_report.write(run)
    assert "--resume" not in read(run).text  # nothing was saved
    (run / "checkpoints" / "000003").mkdir(parents=True)
    for version in (0, 3):
        film(tmp_path / "frames", "push", version, won=version > 0)
    films.make_videos(tmp_path / "frames", run / "videos")
    html_report.write(run)
    page = read(run)
    assert page.words.index("3 iterations done") < page.words.index("x") and not page.refreshes
    assert page.text.index("3 iterations done") < page.text.index("What it did")
    for words in (
        "100 env steps/s, 10.0 chunk steps trained/s",
        "Advice: ",
        "held-out, version 0 held-out, version 3 training, iterations 2 to 3",
        # Of 7 episodes of three tasks the first one has 3; of training 2 · 4.
        "push 0% [0%, 56%] 0 of 3 100% [44%, 100%] 3 of 3 75% [41%, 93%] 6 of 8",
        "dunk 50% [9%, 91%] 1 of 2 50% [9%, 91%] 1 of 2 –",
        "all tasks 43% [16%, 75%] 3 of 7 71% [36%, 92%] 5 of 7 –",
        "are too narrow where a group of them begins alike (GRPO)",
        "Not filmed: 2 of 3 tasks (reach, dunk).",
        "version 0: no success version 3: success",
        "python train.py --resume " + str(run),
        "settings: the first 3 differ from the defaults",
        "setting in this run default env-workers 3 0",
        "torch 2",
        "critical: train 97%",
    ):
        assert words in page.text, (words, page.text)
    names = [image["class"] for image in page.all("img")]
    assert names == ["curve", "staleness", "swimlane"] and len(page.all("video")) == 2
    assert (run / "report.html").stat().st_size < 10e6


def grpo() -> Config:
    config = full()
    config.train.algorithm = "grpo"
    return config


def test_the_warnings_of_a_run_are_on_its_page(tmp_path):
    run = a_run(tmp_path / "x", [played(number, clip_fraction=0.9) for number in range(1, 6)])
    html_report.write(run)
    assert "1 warning iteration 3: warning: 90% of samples lie outside the clip" in read(run).text
    # Those of the newest iterations, if there are many.
    many_signs = {"clip_fraction": 0.9, "masked_fraction": 0.9}
    run = a_run(tmp_path / "y", [played(number, **many_signs) for number in range(1, 150)])
    html_report.write(run)
    text = read(run).text
    assert "10 warnings, the newest 8" in text and "iteration 3:" not in text
    assert text.count("iteration 123: warning: ") == 2


SECTIONS = ("What it did", "Success over time", "Success per task", "Staleness", "Who worked")
NO_EPISODE = {"success_rate": None, "entropy_or_noise": None}


@pytest.mark.parametrize(
    "lines, spans, config, lacks",
    [
        ([], None, full(), {*SECTIONS}),
        ([played(1)], SPANS, full(), set()),
        ([line(1, success_rate=None)], None, full(), {"Success per task", "Who worked"}),
        ([played(1), played(2)], None, full(), {"held-out, version", "Who worked"}),
        ([line(1, **NO_EPISODE), line(2, **NO_EPISODE)], SPANS, grpo(), {"Success per task"}),
    ],
    ids=["no line", "one line", "no trace", "no evaluation", "grpo"],
)
def test_a_section_is_there_if_there_is_something_to_show(tmp_path, lines, spans, config, lacks):
    run = a_run(tmp_path / "x", lines, config, spans)
    html_report.write(run)
    text = read(run).text
    for words in {*SECTIONS} | lacks:
        assert (words in text) == (words not in lacks), (words, text)
    assert "Nothing was filmed (no held-out evaluation has been played)" in text
    assert f"of {config.train.iterations}: the run goes on, or was killed" in text
    assert "To repeat it" in text


def test_a_failed_run_says_why_first_also_before_its_first_line(tmp_path):
    run = a_run(tmp_path / "x", [])
    note(run, ended="error: worker env-0 failed: <boom>", status=1)
    (run / "error.txt").write_text("env-0\nTraceback & more\n")
    html_report.write(run)
    page = read(run)
    assert page.all("p")[0]["class"] == "state failed"
    text = page.text
    assert text.index("<boom>") < text.index("Traceback & more") < text.index("pi05 on metaworld")


def test_foreign_words_stay_words(tmp_path):
    evil = '<img src=x onerror="alert(1)">&\'{0}'
    config = full()
    config.train.tasks = (evil,)
    config.train.suite = evil
    one = evaluated(1, {evil: 0.5}, 2, 0, **{f"success_{evil}": 1.0})
    one |= {"episodes_per_task": {evil: 3}}
    run = a_run(tmp_path / "a <b> [bold] & c", [one], config)
    note(run, ended=evil, status=1, commands=[evil], where=evil, versions={evil: evil})
    (run / "error.txt").write_text(evil)
    film(tmp_path / "frames", evil, 0)
    films.make_videos(tmp_path / "frames", run / "videos")
    html_report.write(run)
    page = read(run)
    assert page.text.count(evil) >= 9 and "a <b> [bold] & c" in page.words
    assert len(page.all("video")) == 1 and evil in page.all("video")[0]["aria-label"]


def test_a_damaged_about_json_costs_only_what_it_would_have_said(tmp_path):
    run = a_run(tmp_path / "x", [played(1)])
    wrong = ('"commands": 5', '"ended": 3', '"where": null', '"versions": [1]', '"status": "1"')
    for text in ("{", "[1, 2]", '{"commands": []', *(f"{{{one}}}" for one in wrong)):
        (run / "about.json").write_text(text)
        html_report.write(run)
        assert "iteration 1 of" in read(run).text


@pytest.mark.parametrize("lacks", ["eval_episodes", "eval_version", "eval_per_task", "rates"])
def test_an_evaluation_of_an_earlier_version_is_left_out(tmp_path, lacks):
    old = evaluated(1, {"push": 0.5}, 2, 0, success_push=None, episodes_per_task={"push": 2})
    old |= {"eval_per_task": {}} if lacks == "rates" else {}
    old.pop(lacks, None)
    html_report.write(a_run(tmp_path / "x", [old]))
    text = read(tmp_path / "x").text
    assert "held-out, version" not in text and "training, iterations 1 to 1" in text


def test_training_episodes_are_counted_per_task():
    lines = [played(1), played(2), line(3)]
    assert html_report.trained(lines) == {"push": (6, 8), "reach": (0, 6)}
    few = evaluated(1, {"push": 1.0, "reach": 0.0}, 2, 0)  # and a third task without an episode
    assert html_report.held_out(few) == {"push": (1, 1), "reach": (0, 1)}
    assert "[{:.0%}, {:.0%}]".format(*wilson(6, 8)) in html_report.cell(6, 8)


# ---------------------------------------------------------------- when it is written


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    run = a_run(tmp_path / "x", [])
    (run / "checkpoints").mkdir()
    return RunFolder(run, resume=False)


def test_the_report_of_a_run_that_goes_on_and_ends(folder, monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(html_report.time, "monotonic", lambda: now[0])
    html_report.begin(folder, html_report.command(1, ["--run", "a b"]), "no GPU", False)
    watcher = html_report.Watcher(folder)
    assert "starting the workers" in read(folder.path).text and read(folder.path).refreshes
    watcher.write("5 of 6 workers are ready after 12 s")
    assert "5 of 6 workers are ready" in read(folder.path).text

    # The first line is shown at once, the next ones not before it is time.
    for number, shown in ((1, 1), (2, 1), (3, 3)):
        now[0] += 1000.0 * (number == 3)
        folder.append(played(number))
        watcher.news = True
        watcher.look()
        assert f"iteration {shown} of 60: the run goes on" in read(folder.path).text
    assert watcher.due >= now[0] + html_report.EVERY_S and read(folder.path).refreshes
    html_report.end(folder, "interrupted; saved x", 130)
    page = read(folder.path)
    assert page.text.index("interrupted; saved x") < page.text.index("What it did")
    assert not page.refreshes and "python train.py --run 'a b'" in page.text
    assert not list(folder.path.glob(".report*"))
    said = capsys.readouterr()
    assert f"report in {folder.path / 'report.html'}" in said.out and not said.err

    # It is resumed: the command joins the one that it began with, and it has no end yet.
    html_report.begin(folder, html_report.command(1, ["--resume", "x"]), "no GPU", True)
    assert html_report.about(folder.path)["commands"][1] == "python train.py --resume x"
    assert "ended" not in html_report.about(folder.path)


def test_a_report_of_an_interrupted_run_does_not_keep_a_scheduler_waiting(folder, capsys):
    """The trace and the films that are left come with `python -m metrics`."""
    run = folder.path
    folder.append(played(1))
    write_trace(run / "trace.json", SPANS)
    for task in ("push", "reach"):
        film(folder.spans, task, 0)
    films.make_videos(folder.spans, run / "videos", seconds=-1.0)
    html_report.end(folder, "interrupted; saved x", 130)
    page = read(run)
    assert "interrupted; saved x" in page.text and "Who worked" not in page.text
    assert [image["class"] for image in page.all("img")] == ["curve", "staleness"]
    said = capsys.readouterr()
    assert f"python -m metrics {run} adds what takes longer" in said.out and not said.err
    html_report.write(run)
    page = read(run)
    assert "Who worked" in page.text and len(page.all("video")) == 2
    assert not list(run.glob("**/*.npy"))


def test_python_m_metrics_reads_the_trace_once(folder, monkeypatch, capsys):
    folder.append(played(1))
    write_trace(folder.path / "trace.json", SPANS)
    reads = []
    read_trace = html_report.pictures.read_trace
    monkeypatch.setattr(
        html_report.pictures, "read_trace", lambda run: reads.append(run) or read_trace(run)
    )
    monkeypatch.setattr("sys.argv", ["metrics", str(folder.path)])
    html_report.main()
    said = capsys.readouterr()
    assert reads == [folder.path] and "critical: train 97%" in said.out and not said.err


def test_what_pip_left_half_removed_stops_no_run(folder, monkeypatch, tmp_path, capsys):
    for left in ("~orch-2.0.dist-info", "numpy-9.dist-info"):
        (tmp_path / "packages" / left).mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    (folder.path / "about.json").write_text('{"commands": 5}')
    html_report.begin(folder, "python train.py", "no GPU", True)
    noted = html_report.about(folder.path)
    assert noted["commands"] == ["python train.py"] and not capsys.readouterr().err
    assert noted["versions"]["numpy"] == "unknown" and noted["versions"]["rich"]
    # Neither does a disk that is full.
    monkeypatch.setattr(folder, "write", lambda *_: os.close(-1))
    html_report.begin(folder, "python train.py", "no GPU", True)
    said = capsys.readouterr().err
    assert said.startswith("warning: cannot write") and said.count("\n") == 1


def test_a_run_that_begins_anew_keeps_the_report_of_the_one_before(folder):
    film(folder.spans, "push", 3)
    films.make_videos(folder.spans, folder.path / "videos")
    (folder.path / "report.html").write_text("before")
    os.close(folder.lock)
    html_report.begin(RunFolder(folder.path, resume=False), "python train.py", "no GPU", False)
    assert (folder.path / "report.html.old").read_text() == "before"
    assert films.films_in(folder.path / "videos") == {}


def test_trouble_with_a_report_is_one_warning(folder, monkeypatch, capsys):
    def broken(*_, **__):
        raise MemoryError("no\nroom")

    watcher = html_report.Watcher(folder)
    monkeypatch.setattr(html_report.pictures, "draw", broken)
    for _ in range(3):
        watcher.news = True
        watcher.look()
    said = capsys.readouterr().err
    assert said == f"warning: cannot write {folder.path}/report.html: MemoryError: no room\n"
    assert watcher.due == math.inf
    html_report.end(folder, "done", 0)
    assert capsys.readouterr().err == said


# ---------------------------------------------------------------- films


def test_of_a_tasks_films_the_first_and_the_last_stay(tmp_path):
    for version in (0, 10, 20, 30):
        film(tmp_path, "push", version, won=version > 10)
        film(tmp_path, "reach/here", version)
    videos = tmp_path / "videos"
    for folder, kind in ((tmp_path, "npy"), (videos, "mp4")):
        if kind == "mp4":
            films.make_videos(tmp_path, videos)
            assert not list(tmp_path.glob("*.npy"))
        found = films.films_in(folder, kind)
        assert list(found) == ["push", "reach_here"]
        assert [(one.version, one.won) for one in found["push"]] == [(0, False), (30, True)]
    # A later one takes the place of the last one; what evaluate.py filmed is not touched.
    filmed = videos / "000030" / "push.mp4"
    filmed.parent.mkdir()
    filmed.touch()
    film(tmp_path, "push", 40)
    films.make_videos(tmp_path, videos)
    assert [one.version for one in films.films_in(videos)["push"]] == [0, 40]
    assert filmed.exists()


@pytest.mark.parametrize("size, side", [(64, 256), (33, 264), (224, 224), (256, 256), (301, 302)])
def test_a_video_shows_the_frames_that_were_taken(tmp_path, size, side):
    film(tmp_path, "push", 0, size=size)
    taken = np.load(tmp_path / "push_000000_success.npy")
    films.make_videos(tmp_path, tmp_path)
    shown = imageio.mimread(tmp_path / "push_000000_success.mp4")
    assert len(shown) == len(taken) and shown[0].shape == (side, side, 3)
    mean = [abs(a.mean() - b.mean()) for a, b in zip(taken, shown, strict=True)]
    assert max(mean) < 8


def test_a_film_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch, capsys):
    film(tmp_path, "push", 0)
    (tmp_path / "reach_000000_success.npy").write_bytes(b"torn")
    monkeypatch.setattr(imageio, "mimwrite", lambda *_, **__: None)  # as an encoder that fails
    films.make_videos(tmp_path, tmp_path / "videos")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(one.startswith("warning: cannot write the film") for one in said)
    assert not list(tmp_path.glob("*.npy")) and films.films_in(tmp_path / "videos") == {}


def test_writers_in_one_folder_keep_to_their_films(tmp_path, monkeypatch):
    def encode(partial, frames, **_):
        partial.write_text(frames[0])
        if frames == ["a"]:
            films.write_video(tmp_path / "b.mp4", ["b"], 15)  # another writer, meanwhile
        assert frames != ["c"]  # an encoder that fails

    monkeypatch.setattr(imageio, "mimwrite", encode)
    films.write_video(tmp_path / "a.mp4", ["a"], 15)
    with pytest.raises(AssertionError):
        films.write_video(tmp_path / "c.mp4", ["c"], 15)
    written = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert written == {"a.mp4": "a", "b.mp4": "b"}


def test_which_episodes_are_filmed():
    config = Config()

    def filmed(tasks: int, first: list[int], **settings) -> set[int]:
        for name, value in settings.items():
            setattr(config.env, name, value)
        return films.filmed_episodes(config, first, tasks)

    assert filmed(3, [0, 1, 2, 3], eval_envs=4, eval_episodes=24) == {0, 1, 2}
    assert filmed(10, [0, 1, 2, 3]) == set(range(10))
    assert filmed(90, [0, 1, 2, 3], eval_episodes=90) == set(range(films.TASKS))
    assert filmed(3, [0, 1, 2, 3], eval_episodes=2) == {0, 1}
    # Four envs that step together play the same.
    config.env.lanes = config.env.env_workers = 1
    assert filmed(3, [0, 1, 2, 3], eval_episodes=24) == {0, 1, 2}
    # The first of two nodes has half of the envs, and of some numbers of tasks only half, too.
    config.env.lanes = 0
    config.train.nodes = 2
    assert filmed(3, [0, 1], eval_envs=2) == {0, 1, 5}
    assert filmed(10, [0], eval_envs=1) == {0, 2, 4, 6, 8}


def test_a_camera_takes_some_sixty_frames_and_its_trouble_waits():
    frames = iter(np.zeros((3, 300, 300, 3), np.uint8))

    def draws() -> np.ndarray:
        try:
            return next(frames)
        except StopIteration:
            raise RuntimeError("no GL context") from None

    camera = films.Camera(draws, "push", 0, 520)
    assert camera.every == 9  # 58 frames
    for step in range(19):
        camera.look(step)
    assert len(camera.frames) == 3 and camera.trouble == ""
    assert camera.frames[0].shape == (256, 256, 3)  # no film is larger, whatever the policy sees
    with pytest.raises(OSError, match="RuntimeError: no GL context"):
        camera.leave(Path("/nowhere"), True)


def filming_lanes(tmp_path, count: int) -> EvaluationLanes:
    """Returns one evaluation lane that is filmed, of so many envs."""
    lanes = EvaluationLanes.__new__(EvaluationLanes)
    lane = SimpleNamespace(cameras={0: "another camera"})
    lanes.__dict__ |= {"films": tmp_path, "filmed": {0, 1}, "lanes": {0: lane}}
    lanes.shard = SimpleNamespace(meter=SimpleNamespace(name="env-0"))
    return lanes


@pytest.mark.parametrize("kind", ["shapes", "full disk", "no array"])
def test_a_film_that_cannot_be_kept_is_one_warning_and_the_last(
    tmp_path, monkeypatch, capsys, kind
):
    sizes = iter((8, 9) if kind == "shapes" else (8, 8))
    camera = films.Camera(lambda: np.zeros((next(sizes),) * 2 + (3,), np.uint8), "push", 0, 90)
    if kind == "full disk":
        monkeypatch.setattr(films.np, "save", lambda file, _: file.write(b"x") and os.close(-1))
    if kind == "no array":
        camera.film = lambda: object()
    camera.look(0)
    lanes = filming_lanes(tmp_path, 2)
    lanes.keep_film(camera, True)
    said = capsys.readouterr().err
    assert said.startswith("warning: env-0 films no more: ") and said.count("\n") == 1
    assert lanes.filmed == set() and lanes.lanes[0].cameras == {}
    assert list(tmp_path.iterdir()) == []


def test_a_worker_may_remove_a_film_that_the_launcher_has_listed(tmp_path, monkeypatch, capsys):
    film(tmp_path, "push", 0)
    (left,) = tmp_path.glob("*.npy")
    monkeypatch.setattr(Path, "glob", lambda *_: left.unlink(missing_ok=True) or iter([left]))
    films.make_videos(tmp_path, tmp_path / "videos")
    assert capsys.readouterr().err == ""


def test_a_lane_whose_envs_step_together_films_what_the_policy_sees():
    """One frame per chunk, of each env that is filmed, and one of its end: all envs are drawn for
    every picture, so no other is drawn."""
    lane = many(3)
    drawn = []
    observe = lane.player.observe
    lane.player.observe = lambda: drawn.append(1) or observe()
    lane.reset([0, 1, 2], [0, 0, 1], [1, 2, 3])
    for row in (0, 2):
        lane.cameras[row] = films.Camera(partial(lane.film, row), "one", 0, 6)
    lane.observe()
    lane.play([script(), script(), script()])
    lane.observe()
    outcome = lane.play([script(0), script(1), script()])
    assert outcome.ended() == [0, 1, 2] and len(drawn) == 3
    for camera in lane.cameras.values():
        camera.look(math.inf)
    steps = {row: [int(frame[0, 0, 0]) for frame in lane.cameras[row].frames] for row in (0, 2)}
    assert steps == {0: [0, 3, 6], 2: [0, 3, 6]} and lane.cameras[0].trouble == ""


def test_evaluation_lanes_film_each_task_and_nobody_waits_for_it(monkeypatch, tmp_path):
    with worker_starter(monkeypatch) as start:
        channels = start(eval_envs=1, eval_episodes=3, eval_every=2, films=tmp_path)
        requests(channels, 2)
        for number, version in ((1, 0), (2, 4), (3, 6)):
            publish(channels, version)
            begin_round(channels, number)
            for episode in range(3):
                for success_at in (None, 2 if episode == 0 else None):
                    (record,) = requests(channels, 1)
                    answer(channels, record, plan(success_at))
                # Once an outcome is there the run may end, so the film must be there before.
                while counted(channels, f"outcome_{episode}")[0] < 2 * number:
                    time.sleep(0.001)
                name = ("one_{:06d}_success", "two_{:06d}_failure")[episode % 2]
                assert (tmp_path / f"{name.format(version)}.npy").exists()
            assert requests(channels, 0) == []
        found = films.films_in(tmp_path, "npy")
        assert {task: [one.version for one in of] for task, of in found.items()} == {
            "one": [0, 6],
            "two": [0, 6],
        }
        frames = np.load(found["two"][0].file)  # of 6 control steps, at 0, 2, 4 and the end
        assert frames[:, 0, 0, 1].tolist() == [0, 2, 4, 6] and frames.shape[1:] == (2, 2, 3)


# ---------------------------------------------------------------- in a browser

LOOK = """<script>setTimeout(() => {
  const videos = [...document.querySelectorAll("video")];
  const images = [...document.querySelectorAll("img")];
  top.document.body.dataset.seen = JSON.stringify({
    width: innerWidth, needed: document.documentElement.scrollWidth,
    videos: videos.map(v => [v.readyState, v.videoWidth, v.currentTime > 0]),
    images: images.map(i => [i.naturalWidth > 0, i.clientWidth]),
    text: Math.min(...[...document.querySelectorAll("p, td, small, pre")].map(
      e => parseFloat(getComputedStyle(e).fontSize)))});
}, 2500)</script>"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_all_of_it_without_scrolling_sideways(tmp_path, width):
    long = "a_task_whose_name_is_as_long_as_those_of_libero_are_and_has_no_space"
    one = evaluated(1, {"push": 0.5, long: 1.0}, 4, 0) | played(1)
    run = a_run(tmp_path / "x", [one, played(2)])
    note(run, ended=f"error: {'x' * 300}", status=1)
    film(tmp_path / "frames", long, 0)
    film(tmp_path / "frames", long, 1)
    films.make_videos(tmp_path / "frames", run / "videos")
    html_report.write(run)
    # A window is at least 500 pixels wide; a frame can be as narrow as a phone.
    text = (run / "report.html").read_text().replace("</body>", LOOK + "</body>")
    frame = f'<iframe width="{width}" height="900" frameborder="0" srcdoc="{html.escape(text)}">'
    (run / "frame.html").write_text(f"<body>{frame}</iframe></body>")
    flags = "--headless --no-sandbox --disable-gpu --virtual-time-budget=8000 --dump-dom "
    flags += "--autoplay-policy=no-user-gesture-required --window-size=1400,1000"
    command = ["chromium", *flags.split(), (run / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    seen = json.loads(html.unescape(re.search(r'<body data-seen="(.*?)"', done.stdout)[1]))
    assert seen["needed"] <= seen["width"] == width, seen
    assert [video[:2] for video in seen["videos"]] == [[4, 256]] * 2
    assert all(video[2] for video in seen["videos"]) and seen["text"] >= 12
    assert all(shown and side >= min(width - 50, 450) for shown, side in seen["images"])
