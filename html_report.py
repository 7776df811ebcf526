"""Writes report.html of a run: one file that a person can look at and send, with all in it.

    python train.py --watch       while the run goes on; every run writes it at its end
    python -m metrics NAME        anew

It is made from what lies in the run's folder, without scripts and without anything that a browser
would have to fetch. What users, simulators and errors say is escaped. Left out: comparing runs.
"""

import base64
import contextlib
import io
import json
import math
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from html import escape
from importlib import metadata
from pathlib import Path
from string import Template

from rich.console import Console
from typing_extensions import TypedDict

import pictures
import summary
from checks import flag_of, read_json
from config import ASSETS, ROOT, STAGE_OF, Config, existing_run, from_json, setting
from diagnostics import Warnings
from errors import UserError, exit_on_user_error, require, understood
from files import write_whole
from films import Film, file_name, films_in, forget, make_videos
from metrics import wilson
from run_folder import RunFolder, name_of, newest_version

NEWEST = 10  # iterations whose training episodes are counted
LISTED = 8  # warnings, and tasks without a film
DETAILS = 6000  # characters of error.txt, the newest
EVERY_S = 10.0  # seconds between two reports of a run that goes on, at least
SHARE = 0.02  # of one core's time, which they take at most
Counts = dict[str, tuple[int, int]]  # task → successes, episodes

# ---------------------------------------------------------------- about.json


class About(TypedDict, total=False):
    """What about.json says. Each may be missing, in a run of an earlier version."""

    commands: list[str]  # that began and resumed it
    where: str  # on which devices
    versions: dict[str, str]  # of packages
    ended: str  # how it has ended, in words
    status: int  # of the process


def about(run: Path) -> About:
    """Reads about.json; a missing or damaged one says nothing."""
    try:
        return read_json(run / "about.json", About, extra="ignore")
    except UserError:
        return {}


@contextlib.contextmanager
def only_warns(run: Path) -> Iterator[None]:
    """Makes a warning of whatever goes wrong inside: the run does what it should without it."""
    try:
        yield
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        print(f"warning: cannot write {run / 'report.html'}: {said}", file=sys.stderr, flush=True)


def begin(folder: RunFolder, started: str, where: str, resumed: bool) -> None:
    """Notes how a run was started, and forgets the films of one that began here before.

    started: the `command`; where: the line that says on which devices. Trouble is a warning."""
    with only_warns(folder.path):
        before = about(folder.path).get("commands", []) if resumed else []
        if not resumed:
            forget(folder.path / "videos", -1)
        versions = {"python": platform.python_version()}
        text = (ROOT / "requirements.txt").read_text()
        for name in re.findall(r"^([\w-]+)==", text, re.MULTILINE):
            with contextlib.suppress(metadata.PackageNotFoundError):
                versions[name] = metadata.version(name) or "unknown"
        note: About = {"commands": [*before, started], "where": where, "versions": versions}
        folder.write("about.json", json.dumps(note, indent=1))


def end(folder: RunFolder, message: str, status: int) -> None:
    """Notes how a run has ended and writes its report, of one that was interrupted without the
    trace, whose reader may take longer than a scheduler waits. Trouble is a warning."""
    with only_warns(folder.path):
        note = about(folder.path) | {"ended": message, "status": status}
        folder.write("about.json", json.dumps(note, indent=1))
        soon = status == 130
        write(folder.path, trace=not soon)
        more = f"; python -m metrics {folder.name} adds what takes longer" * soon
        if status != 1:  # an error is the last that is said
            print(f"report in {folder.path / 'report.html'}{more}", flush=True)


class Watcher:
    """Writes the report of a run that goes on (--watch), as often as SHARE allows."""

    def __init__(self, folder: RunFolder):
        # Importing it takes a second, which would count as the cost of the first report.
        import matplotlib.figure  # noqa: F401

        self.folder = folder
        self.news = False  # whether there is a line that no report shows
        self.due = 0.0  # monotonic seconds, when the next one may be written
        print(f"follow the run in {folder.path / 'report.html'}", flush=True)
        self.write("starting the workers")

    def look(self) -> None:
        """Writes a report if there is news, and time for it."""
        if self.news and time.monotonic() >= self.due:
            self.news = False
            self.write()

    def write(self, said: str = "") -> None:
        """Writes a report. said: how far a run is that has trained nothing yet."""
        if self.due == math.inf:
            return
        self.due = math.inf  # trouble would come again
        began = cpu_s()
        with only_warns(self.folder.path):
            make_videos(self.folder.spans, self.folder.path / "videos")
            write(self.folder.path, said, live=True, trace=False)
            pause = max(EVERY_S, (cpu_s() - began) / SHARE)
            self.due = 0.0 if said else time.monotonic() + pause


def cpu_s() -> float:
    """Returns the CPU seconds of this process, and of encoders that it has started."""
    return sum(os.times()[:4])


# ---------------------------------------------------------------- the page


def write(
    run: Path, said: str = "", live: bool = False, trace: bool = True
) -> tuple[list[dict], dict[str, list]]:
    """Draws a run's pictures and writes report.html. Returns the lines and spans that it shows.

    said: how far a run is without a line. live: it goes on, and a browser looks again. trace: show
    what may take long, too: the trace, and films of which there are only frames."""
    if trace:
        make_videos(run / "videos", run / "videos")
    lines, spans = pictures.draw(run, trace=trace)
    config = from_json(run / "config.json")
    note = about(run)
    parts = (
        head(run, config, note, lines, said, live),
        findings(config, lines, spans),
        '<div class="two">',
        section("Success over time", picture(run, "curve.png", CURVE, lines)),
        section("Success per task", success_table(lines)),
        "</div>",
        section("First and last policy", videos(run, config, lines)),
        section("Staleness", picture(run, "staleness.png", STALENESS, lines)),
        section("Who worked and who waited", picture(run, "swimlane.png", SWIMLANE, spans)),
        section("To repeat it", repeat(run, config, note)),
    )
    body = "\n".join(filter(None, parts))
    again = f'<meta http-equiv="refresh" content="{EVERY_S:.0f}">' if live else ""
    page = Template((ASSETS / "report.html").read_text(encoding="utf-8"))
    text = page.substitute(name=escape(run.name), again=again, body=body)
    write_whole(run / "report.html", text)
    return lines, spans


CURVE = "success rate against minutes"
STALENESS = (
    "of each iteration's samples, how many versions newer the weights were that were trained than "
    "those that had acted"
)
SWIMLANE = "a row per worker, some seconds of the run; trace.json in its folder has all"


def section(title: str, content: str) -> str:
    return content and f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>"


def table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """titles: text; rows: HTML."""
    heads = "".join(f"<th>{escape(title)}</th>" for title in titles)
    cells = ("".join(f"<td>{cell}</td>" for cell in row) for row in rows)
    body = "\n".join(f"<tr>{row}</tr>" for row in cells)
    return f'<div class="wide"><table>\n<tr>{heads}</tr>\n{body}\n</table></div>'


def data(file: Path, kind: str) -> str:
    """Returns a file's contents as an address; kind: its media type."""
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


def picture(run: Path, name: str, caption: str, shown: object) -> str:
    """shown: what was drawn; nothing means that the file, if there is one, shows something else."""
    if not shown:
        return ""
    image = f'<img class="{Path(name).stem}" alt="{caption}" src="{data(run / name, "image/png")}">'
    return f'<figure class="wide">{image}</figure>\n<p class="caption">{caption}</p>'


def head(run: Path, config: Config, note: dict, lines: list, said: str, live: bool) -> str:
    """Says what run this is, and first how it ended or how far it is."""
    train = config.train
    failed = note.get("status", 0) == 1 and not live
    done = lines[-1]["iteration"] if lines else 0
    state = said or note.get("ended", "")
    if live and not said:
        state = f"iteration {done} of {train.iterations}: the run goes on"
    if not state:
        goes_on = ": the run goes on, or was killed" * (done < train.iterations)
        state = f"iteration {done} of {train.iterations}{goes_on}"
    what = f"{train.model} on {train.env}, {train.algorithm}, preset {train.preset}"
    what += f", recipe {train.recipe}" * bool(train.recipe)
    when = f"written on {time.strftime('%Y-%m-%d at %H:%M:%S %Z')}"
    where = f"<br>{escape(note['where'])}" if "where" in note else ""
    file = run / "error.txt"
    details = file.read_text(errors="replace")[-DETAILS:] if failed and file.is_file() else ""
    return "\n".join(
        (
            f'<p class="{"state failed" if failed else "state"}">{escape(state)}</p>',
            folded("error.txt", f"<pre>{escape(details)}</pre>") if details else "",
            f"<h1>{escape(run.name)}</h1>",
            f'<p class="caption">{escape(what)}{where}<br>{when}</p>',
        )
    )


def folded(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>\n{content}\n</details>"


def findings(config: Config, lines: list[dict], spans: dict[str, list]) -> str:
    """Returns what `python -m metrics` says, its advice first, and the run's warnings."""
    if not any("waits" in line for line in lines):
        return ""
    found = summary.summarise(lines, spans)
    rows = (line.split(maxsplit=1) for line in summary.facts(found).splitlines())
    facts = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in rows)
    advice = f"<p><b>Advice:</b> {escape(summary.advice(found, config))}</p>"
    watcher = Warnings()
    said = [f"iteration {line['iteration']}: {text}" for line in lines for text in watcher.of(line)]
    items = "".join(f"<li>{escape(text)}</li>" for text in said[-LISTED:])
    newest = f", the newest {LISTED}" * (len(said) > LISTED)
    count = f"{len(said)} warning{'s' * (len(said) > 1)}"
    warnings = f"<h3>{count}{newest}</h3><ul>{items}</ul>" if said else ""
    console = Console(file=io.StringIO(), width=110, highlight=False, record=True)
    summary.show_tables(console, found)
    tables = folded("stages, batches and staleness", f"<pre>{escape(console.export_text())}</pre>")
    return section("What it did", f"<dl>{facts}</dl>\n{advice}\n{warnings}\n{tables}")


def held_out(line: dict) -> Counts:
    """Returns the outcomes of an evaluation: episode e was of the e-th task, then round again."""
    rates = line["eval_per_task"]
    counts = [len(range(k, line["eval_episodes"], len(rates))) for k in range(len(rates))]
    return {t: (round(rates[t] * n), n) for t, n in zip(rates, counts, strict=True)}


def trained(lines: list[dict]) -> Counts:
    """Returns the outcomes of these iterations' training episodes."""
    found: Counts = {}
    for line in lines:
        for task, n in line.get("episodes_per_task", {}).items():
            won, all_n = found.get(task, (0, 0))
            found[task] = won + round(n * (line.get(f"success_{task}") or 0.0)), all_n + n
    return {task: pair for task, pair in found.items() if pair[1]}


def success_table(lines: list[dict]) -> str:
    """Returns success rates with intervals of the first and the newest evaluation, and of the
    newest training episodes."""
    needed = {"eval_per_task", "eval_episodes", "eval_version"}
    evaluated = [line for line in lines if needed <= line.keys() and line["eval_per_task"]]
    columns = {}
    for line in evaluated[:1] + evaluated[-1:]:
        outcomes = held_out(line)
        total = tuple(map(sum, zip(*outcomes.values(), strict=True)))
        columns[f"held-out, version {line['eval_version']}"] = outcomes | {"all tasks": total}
    newest = [line for line in lines if "episodes_per_task" in line][-NEWEST:]
    if played := trained(newest):
        first, last = newest[0]["iteration"], newest[-1]["iteration"]
        columns[f"training, iterations {first} to {last}"] = played
    if not columns:
        return ""
    tasks = list(dict.fromkeys(task for outcomes in columns.values() for task in outcomes))
    tasks.sort(key=lambda task: task == "all tasks")
    rows = (
        (escape(task), *(cell(*outcomes.get(task, (0, 0))) for outcomes in columns.values()))
        for task in tasks
    )
    note = "95 % intervals (Wilson). Held-out episodes begin alike in every evaluation and are "
    note += "played without exploration; training explores, while the policy changes. Its "
    note += "intervals take episodes for independent, and are too narrow where a group of them "
    note += "begins alike (GRPO)."
    return table(("task", *columns), rows) + f'\n<p class="caption">{note}</p>'


def cell(won: int, n: int) -> str:
    """Returns a rate in words and as a bar, with its interval."""
    if not n:
        return "–"
    low, high = wilson(won, n)
    bar = f'<rect class="range" x="{100 * low:.1f}" width="{100 * (high - low):.1f}" height="8"/>'
    bar += f'<rect class="rate" x="{99 * won / n:.1f}" width="1" height="8"/>'
    bar = f'<svg viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">{bar}</svg>'
    words = f"<small>[{low:.0%}, {high:.0%}]</small> <small>{won} of {n}</small>"
    return f"<b>{won / n:.0%}</b> {words}{bar}"


def videos(run: Path, config: Config, lines: list[dict]) -> str:
    """Returns each task's first and last film side by side, and which tasks have none."""
    found = films_in(run / "videos")
    if not found:
        why = "--no-film" if not config.train.film else "no held-out evaluation has been played"
        later = "<code>python evaluate.py --checkpoint</code> films every task"
        return f'<p class="caption">Nothing was filmed ({why}): {later}.</p>'
    groups = []
    for task, films in found.items():
        both = "".join(video(film) for film in dict.fromkeys((films[0], films[-1])))
        groups.append(f'<div><h3>{escape(task)}</h3>\n<div class="pair">{both}</div></div>')
    played = dict.fromkeys(task for line in lines for task in line.get("eval_per_task", {}))
    without = [task for task in played if file_name(task) not in found]
    said = "A task's first held-out episode that the first node plays, of a dozen tasks, as the "
    said += "policy's first camera sees it."
    if without:
        names = ", ".join(without[:LISTED]) + ", …" * (len(without) > LISTED)
        said += f" Not filmed: {len(without)} of {len(played)} tasks ({escape(names)})."
    return f'<p class="caption">{said}</p>\n<div class="films">{"".join(groups)}</div>'


def video(film: Film) -> str:
    how = f"version {film.version}: {'success' if film.won else 'no success'}"
    label = escape(f"{film.task}, {how}")
    source = f'src="{data(film.file, "video/mp4")}" aria-label="{label}"'
    return (
        f"<figure><video controls autoplay muted loop playsinline {source}></video>"
        f"<figcaption>{how}</figcaption></figure>"
    )


def command(nodes: int, flags: list[str]) -> str:
    """Returns what a user types, on each of so many nodes."""
    launcher = ["torchrun", "…", "--", "train.py"] if nodes > 1 else ["python", "train.py"]
    return " ".join(launcher) + " " * bool(flags) + shlex.join(flags)


def repeat(run: Path, config: Config, note: dict) -> str:
    """Returns commands, settings and versions."""
    commands = list(note.get("commands", []))
    if newest_version(run) is not None:
        commands.append(command(config.train.nodes, ["--resume", name_of(run)]))
        commands.append(f"python evaluate.py --checkpoint {shlex.quote(str(run))}")
    defaults = Config()
    rows = []
    for name in STAGE_OF:
        here, usual = setting(config, name), setting(defaults, name)
        words = flag_of(name)[2:], show_value(here), show_value(usual)
        rows.append((here == usual, [escape(word) for word in words]))
    rows.sort(key=lambda row: row[0])
    changed = sum(not same for same, _ in rows)
    settings = table(("setting", "in this run", "default"), (words for _, words in rows))
    versions = [map(escape, map(str, pair)) for pair in note.get("versions", {}).items()]
    parts = (
        f"<pre>{escape(chr(10).join(map(str, commands)))}</pre>",
        folded(f"settings: the first {changed} differ from the defaults", settings),
        folded("versions", table(("package", "version"), versions)) if versions else "",
    )
    return "\n".join(parts)


def show_value(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def main() -> None:
    """Draws a run's pictures, writes its report and prints its summary (`python -m metrics`)."""
    how = "python -m metrics NAME, of runs/NAME, or a path with a slash"
    with exit_on_user_error():
        if sys.argv[1:] in (["-h"], ["--help"]):
            print(f"{summary.__doc__}\n{how}")
            return
        named = len(sys.argv) == 2 and not sys.argv[1].startswith("-")
        require(named, f"give one run to look at: {how}")
        run = existing_run(sys.argv[1])
        file = run / "metrics.jsonl"
        unknown = f"{run} is not the folder of a run that has trained: it holds no metrics.jsonl"
        require(file.is_file(), unknown)
        with understood(f"what run {run} left behind"):
            lines, spans = write(run)
            require(lines, f"{file} is empty: the run ended before its first iteration")
            found = summary.summarise(lines, spans)
        console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
        summary.show(console, run.name, found, from_json(run / "config.json"))
