"""What the documents say: their forks apply and run, the symbols they name exist, their links lead
somewhere, what they start on several machines is understood, and messages are those of the code.
"""

import ast
import importlib
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

import command_line
from config import ROOT

DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
QUICK = "--iterations 2 --envs 4 --batch 4 --minibatch 4 --segment 2 --env-workers 1 --eval-every 0"


def forks() -> list[tuple[str, str, str]]:
    """Title, diff and command of every section of docs/fork.md."""
    found = []
    for section in (ROOT / "docs" / "fork.md").read_text().split("\n## ")[1:]:
        diff = re.search(r"```diff\n(.*?)```", section, re.S)
        command = re.search(r"^    python (train\.py.*)$", section, re.M)
        found.append((section.splitlines()[0], diff[1], command[1]))
    return found


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the files that git knows, or would."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/")):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("title, diff, command", forks(), ids=lambda text: text[:24].split("\n")[0])
def test_a_fork_applies_and_trains(cli, checkout, title, diff, command):
    (checkout / "fork.diff").write_text(diff)
    applied = subprocess.run(
        ["git", "apply", "fork.diff"], cwd=checkout, capture_output=True, text=True
    )
    assert applied.returncode == 0, applied.stderr
    file, _, flags = command.partition(" ")
    run = checkout / "runs" / "fork"
    process = cli(checkout / file, f"{flags} {QUICK} --run {run}", cwd=checkout)
    status, output = process.finish(150.0)
    assert status == 0 and "2 iterations done" in output, output


def test_there_are_five_forks():
    assert len(forks()) == 5


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_mechanism_names_a_symbol_that_exists():
    """`module.Class.method` and `module.NAME`, as docs/paper.md writes them."""
    text = (ROOT / "docs" / "paper.md").read_text()
    symbols = {s for s in re.findall(r"`([a-z_]+(?:\.\w+)+)`", text) if not s.endswith(FILES)}
    assert len(symbols) > 15
    for symbol in symbols:
        names = symbol.split(".")
        depth = 2 if names[0] in ("envs", "models", "planning", "benchmarks") else 1
        thing = importlib.import_module(".".join(names[:depth]))
        for name in names[depth:]:
            assert hasattr(thing, name), f"docs/paper.md names {symbol}, which does not exist"
            thing = getattr(thing, name)


FILES = (".py", ".md", ".jsonl", ".json", ".png", ".sh")


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_links_and_files_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            slugs = [re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings]
            assert anchor in slugs, f"{page.name} links to {target}"
    for name in re.findall(r"`((?:\w+/)*\w+\.(?:py|md))`", text):
        places = [ROOT / name, ROOT / "docs" / name, ROOT / "tests" / name, page.parent / name]
        known = any(p.is_file() for p in places) or [
            *ROOT.glob(f"*/{name}"),
            *ROOT.glob(f"*/*/{name}"),
        ]
        assert known or "fork.md" in page.name, f"{page.name} names {name}"


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_the_tests_that_a_page_names_exist(page):
    for file, name in re.findall(r"(test_\w+\.py)::(test_\w+)", page.read_text()):
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), f"{file}::{name}"


NODES = (ROOT / "docs" / "nodes.md").read_text()
# Words of torch, in what an actor worker says (`follow.LOST`) or a launcher.
TORCH = ["Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL"]
TORCH += ["Gloo connectFullMesh failed with …", "Unable to find address for: …"]


def understood(words: list[str]):
    """What torchrun makes of a command line, "torchrun" left out, whose rest train.py takes."""
    from torch.distributed.run import config_from_args, get_args_parser

    args = get_args_parser().parse_args(words)
    config, _, (unbuffered, script, *flags) = config_from_args(args)
    assert (unbuffered, script, config.nproc_per_node) == ("-u", "train.py", 1)
    command_line.parse(flags)
    return args


@pytest.mark.parametrize("page", [*DOCS, ROOT / "nodes.py"], ids=lambda page: page.name)
def test_torchrun_and_train_understand_the_commands_of_a_page(page):
    commands = re.findall(r"^    torchrun (.*?)(?: …)?$", page.read_text(), re.M)
    assert commands or page.name not in ("README.md", "nodes.md", "nodes.py")
    for command in commands:
        understood(command.replace("--nnodes N", "--nnodes 4").replace(":PORT", ":29400").split())


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    """The surroundings of a job: an srun that goes on until it is told to end, and takes notes."""
    programs = {
        "srun": "printf '%s\\n' \"$@\" > part; trap 'echo told > told; exit 1' TERM; mv part srun\n"
        "while [ ! -e done ]; do sleep 0.05; done; exit 3",
        "scontrol": 'case "$1" in show) echo gpu-7; echo gpu-8;; *) echo "$@" > scontrol;; esac',
    }
    for name, text in programs.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    job = {"JOB_ID": "123456", "JOB_NAME": "pi05-libero", "JOB_NUM_NODES": "4"}
    job |= {"SUBMIT_DIR": str(tmp_path), "JOB_NODELIST": "gpu-[7-10]"}
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return os.environ | {f"SLURM_{name}": value for name, value in job.items()} | {"PATH": path}


@pytest.mark.parametrize("in_time", [True, False])
def test_the_slurm_script_starts_torchrun_and_queues_itself_again(slurm, tmp_path, in_time):
    """in_time: whether the run ends before Slurm's signal."""
    script = re.search(r"```bash\n(.*?)```", NODES, re.S)[1]
    job = subprocess.Popen(["bash", "-uc", script], env=slurm)
    late = time.monotonic() + 20.0
    while not (tmp_path / "srun").exists() and time.monotonic() < late:
        time.sleep(0.02)
    if in_time:
        (tmp_path / "done").touch()
    else:
        job.send_signal(signal.SIGUSR1)
    assert job.wait(20.0) == (3 if in_time else 0)
    requeued = tmp_path / "scontrol"
    assert requeued.exists() != in_time and (tmp_path / "told").exists() != in_time
    assert in_time or requeued.read_text() == "requeue 123456\n"

    words = (tmp_path / "srun").read_text().splitlines()
    args = understood(words[words.index("torchrun") + 1 :])
    assert args.nnodes == "4" and args.rdzv_endpoint == "gpu-7:23456"
    patience = int(re.search("--signal=B:USR1@(.*)", script)[1])
    assert patience - 60 > args.shutdown_timeout  # the signal may come a minute early or late


def test_the_kubernetes_sketch_starts_torchrun_once_per_pod():
    service, job = yaml.safe_load_all(re.search(r"```yaml\n(.*?)```", NODES, re.S)[1])
    name = job["metadata"]["name"]
    pod = job["spec"]["template"]["spec"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert service["metadata"]["name"] == pod["subdomain"]
    (container,) = pod["containers"]
    assert container["command"] == ["torchrun"]
    words = [word.replace("$(JOB_COMPLETION_INDEX)", "3") for word in container["args"]]
    args = understood(words)
    assert (args.node_rank, args.rdzv_backend) == (3, "static")
    assert args.master_addr == f"{name}-0.{pod['subdomain']}"
    assert int(args.nnodes) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert pod["terminationGracePeriodSeconds"] > args.shutdown_timeout
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


def texts(file: str) -> list[str]:
    """All constant text of a module, but docstrings; of an f-string what stands between braces."""
    tree = ast.parse((ROOT / file).read_text())
    lone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return [node.value for node in found if isinstance(node.value, str) and id(node) not in lone]


def consists_of(words: str, known: str, parts: int = 3) -> bool:
    """Whether a text is one of code, or several in a row; an f-string may be put into another."""
    if words in known:
        return True
    cuts = [i for i in range(len(words), 0, -1) if parts > 1 and words[:i] in known]
    return any(consists_of(words[i:], known, parts - 1) for i in cuts)


def test_every_message_that_is_explained_can_be_said():
    files = [
        "nodes.py",
        "joining.py",
        "ranks.py",
        "follow.py",
        "processes.py",
        "train.py",
        "report.py",
    ]
    known = "\0".join(text for file in files for text in texts(file))
    table = NODES.split("## What each message means")[1].split("Before launchers run")[0]
    rows = re.findall(r"^\| (`.*?) \| ", table, re.M)
    messages = [message for row in rows for message in re.findall("`(.*?)`", row)]
    assert len(messages) > 20
    for message in messages:
        for words in map(str.strip, message.split("…")):
            said = len(words) < 2 or message in TORCH or consists_of(words, known)
            assert said, f"nobody says {words!r} any more: {message}"


def test_every_message_of_nodes_is_explained():
    for text in [*texts("nodes.py"), *texts("joining.py")]:
        if len(text.split()) > 3:
            assert text.strip() in NODES, f"docs/nodes.md does not explain {text!r}"
