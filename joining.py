"""How nodes come together: launchers meet in torchrun's store, number themselves, and find out
whether all mean the same; a run that is resumed is copied to those that lack it.

Start at `meet_the_others`. What they say later is in nodes.py.
"""

import contextlib
import hashlib
import json
import platform
import shutil
import socket
import time
import uuid
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import machine
from checks import flag_of
from command_line import BEGINS_FROM, gives, value_of, without
from config import ROOT, STAGE_OF, Config, run_path, setting
from errors import UserError, require
from models import checkpoint
from nodes import FAREWELL_S, LOOK_S, NodeLost, Nodes
from run_folder import checkpoints, newest_version

CLOCKS_S = 10.0  # that the clocks of two nodes may differ
PINGS = 5  # of a clock; the quickest one counts
PIECE = 2**26  # bytes of a file that travel at a time
# What may differ between nodes: where files lie, and how many workers there are of simulators whose
# lanes have one env each; those of others say which envs make a lane.
OWN = ("checkpoint", "adapter", "tokenizer", "run", "resume", "resume_or_start", "node")
OWN += ("env_workers",)
RESUMES = ("--resume", "--resume-or-start")


def meet_the_others(nodes: Nodes, args: list[str]) -> list[str]:
    """Meets the other nodes. Returns the flags that say which run is meant: a job that torchrun has
    started again continues its run. Raises UserError, Ended, NodeLost."""
    if nodes.address is None:
        return args
    limit = value_of(args, "--timeout-s") or ""
    if limit.replace(".", "", 1).isdecimal():  # else `parse` says what is wrong with it
        nodes.limit_s = float(limit)
    store = nodes.open_store()
    before = json.loads(store.get("vla3/run")) if store.check(["vla3/run"]) else {}
    if before and not gives(args, *RESUMES):
        args = [*without(args, "--run"), "--resume-or-start", before["run"]]
    hellos = meet(nodes, store, has_run(value_of(args, *RESUMES), before))
    check_alike(nodes, hellos)
    if nodes.first and before and hellos[0]["saved"] < 0:
        print(f"no node has a checkpoint of run {before['run']}: it begins anew", flush=True)
    nodes.shared = len({json.dumps(hello["file"]) for hello in hellos}) == 1
    if nodes.several:
        nodes.thread.start()
    return args


def has_run(name: str | None, before: dict) -> dict:
    """Says what this node's disk has of a run: the version of its newest checkpoint, -1 where there
    is none, and which file that is.

    before: which run this job has opened, with the folder's number on its disk. Another folder of
    that name is another run's."""
    path = run_path(name) if name else None
    version = newest_version(path) if path else None
    other = version is not None and name == before.get("run") and inode(path) != before["folder"]
    if version is None or other:
        return {"saved": -1, "file": None}
    file = checkpoints(path)[-1] / "state.json"
    return {"saved": version, "file": [inode(file), file.stat().st_mtime_ns]}


def inode(path: Path) -> int:
    """Returns a file's number, which it has on every machine that shares its disk."""
    return path.stat().st_ino


def bring_run(nodes: Nodes, args: list[str], config: Config | None) -> list[str]:
    """Copies a run that is resumed from the first node's disk to those that do not share it.
    Returns the flags that this node is to go on with. Raises UserError, Ended, NodeLost.

    config: of the first node, which has one."""
    if not nodes.several:
        return args
    if nodes.first:
        named = config.train.resume
        nodes.tell({"kind": "resumes", "run": named})
    else:
        named = nodes.wait_for("resumes")[0]["run"]
    if nodes.first or not named:
        if named and not nodes.shared:
            copy_run(nodes, run_path(named), run_path(named))
        return args if nodes.first else without(args, *RESUMES)
    args = without(args, "--run", *RESUMES, *BEGINS_FROM)
    if nodes.shared:
        return [*args, "--resume", named]
    nodes.copied = nodes.folder(named)
    copy_run(nodes, run_path(named), nodes.copied)
    return [*args, "--resume", str(nodes.copied)]


def meet(nodes: Nodes, store: dist.Store, has: dict) -> list[dict]:
    """Waits for all nodes, and numbers them: the first one is the one whose disk has the newest
    checkpoint of the run, or else torchrun's first. Returns what each said of itself.

    has: of `has_run`. Raises UserError."""
    mine = about_this_program() | has | {"id": uuid.uuid4().hex}
    store.set(f"vla3/hello/{nodes.number}", json.dumps(mine))
    hellos = gather(nodes, store) if nodes.number == 0 else answer(nodes, store, mine["id"])
    compare_clocks(nodes, store, hellos)
    newest = max(range(nodes.count), key=lambda node: (hellos[node]["saved"], -node))
    order = [newest, *(node for node in range(nodes.count) if node != newest)]
    nodes.number = order.index(nodes.number)
    nodes.names = [f"node {n} ({hellos[node]['host']})" for n, node in enumerate(order)]
    nodes.clock -= hellos[newest]["clock"]
    return [hellos[node] for node in order]


def gather(nodes: Nodes, store: dist.Store) -> list[dict]:
    """Says again and again whom this node has seen, until all of them have answered: what the
    store holds may be of an earlier start."""
    nodes.meets = store.add("vla3/meets", 1)
    hellos = [f"vla3/hello/{node}" for node in range(nodes.count)]
    answers = [nodes.key("here", node) for node in range(1, nodes.count)]
    late = time.monotonic() + nodes.limit_s
    while not all(store.check([answer]) for answer in answers):
        seen = [json.loads(store.get(key)) if store.check([key]) else {} for key in hellos]
        store.set("vla3/seen", json.dumps([nodes.meets, seen]))
        if time.monotonic() > late:
            away = [node for node, key in enumerate(answers, 1) if not store.check([key])]
            missing = f"of {nodes.count} nodes these have not come within {nodes.limit_s:.0f} s"
            does = "does torchrun run there, with this endpoint?"
            raise UserError(f"{missing}: {machine.ranges(away)}; {does}")
        time.sleep(LOOK_S)
    seen = [json.loads(store.get(key)) for key in hellos]
    store.set(nodes.key("all"), json.dumps(seen))
    return seen


def answer(nodes: Nodes, store: dist.Store, mine: str) -> list[dict]:
    """Answers when torchrun's first node has seen this one, and waits until it has seen all."""
    late = time.monotonic() + nodes.limit_s + FAREWELL_S
    while not (nodes.meets and store.check([nodes.key("all")])):
        if store.check(["vla3/seen"]):
            meets, seen = json.loads(store.get("vla3/seen"))
            if seen[nodes.number].get("id") == mine:
                nodes.meets = meets
                store.set(nodes.key("here", nodes.number), "")
        first = f"torchrun's first node, or another of {nodes.count}, has not come within"
        limit = f"{nodes.limit_s:.0f} s: does train.py run there?"
        require(time.monotonic() < late, f"{first} {limit}")
        time.sleep(LOOK_S)
    return json.loads(store.get(nodes.key("all")))


def compare_clocks(nodes: Nodes, store: dist.Store, hellos: list[dict]) -> None:
    """Adds to what nodes said of themselves how far torchrun's first node's clocks are ahead of
    theirs, in seconds: "clock", the monotonic one, and "date"."""
    if nodes.number == 0:
        found = [[0.0, 0.0]]
        for node in range(1, nodes.count):
            for ping in range(PINGS):
                store.wait([nodes.key("ping", node, ping)])
                now = [time.monotonic(), time.time()]
                store.set(nodes.key("pong", node, ping), json.dumps(now))
            found.append(json.loads(store.get(nodes.key("clock", node)))[1:])
        store.set(nodes.key("clocks"), json.dumps(found))
    else:
        pings = [ask_for_time(nodes, store, ping) for ping in range(PINGS)]
        store.set(nodes.key("clock", nodes.number), json.dumps(min(pings)))
    found = json.loads(store.get(nodes.key("clocks")))
    for hello, (clock, date) in zip(hellos, found, strict=True):
        hello |= {"clock": clock, "date": date}
    nodes.clock = found[nodes.number][0]


def ask_for_time(nodes: Nodes, store: dist.Store, ping: int) -> list[float]:
    """Returns how long torchrun's first node took to answer, and how far its monotonic clock and
    its date are ahead, in seconds."""
    before = time.monotonic()
    date = time.time()
    store.set(nodes.key("ping", nodes.number, ping), "")
    theirs = json.loads(store.get(nodes.key("pong", nodes.number, ping)))
    took = time.monotonic() - before
    return [took, theirs[0] - before - took / 2, theirs[1] - date - took / 2]


def check_alike(nodes: Nodes, hellos: list[dict]) -> None:
    """Raises UserError, the same one on every node, where nodes run different programs, or
    their clocks are apart."""
    first = hellos[0]
    for name, hello in zip(nodes.names, hellos, strict=True):
        for what in ("Python", "torch", "numpy", "vla3"):
            found = f"{name} has {what} {hello[what]}, and {nodes.names[0]} {first[what]}"
            require(hello[what] == first[what], f"{found}: install the same on all nodes")
        apart = first["date"] - hello["date"]
        ahead = "ahead of" if apart > 0 else "behind"
        clock = f"the clock of {name} is {abs(apart):.0f} s {ahead} that of {nodes.names[0]}"
        require(abs(apart) < CLOCKS_S, f"{clock}: synchronise them (NTP)")


def copy_run(nodes: Nodes, run: Path, into: Path) -> None:
    """Copies from the first node to the others what a resumed run needs: its newest checkpoint,
    and the small files beside."""
    files = []
    if nodes.first:
        parts = [path for path in run.iterdir() if path.suffix in (".json", ".jsonl", ".model")]
        parts = [path for path in parts if path.name not in ("trace.json", "tuning.json")]
        parts += [path for path in checkpoints(run)[-1].rglob("*") if path.is_file()]
        files = [(str(path.relative_to(run)), path.stat().st_size) for path in parts]
    if not nodes.first:
        shutil.rmtree(into / "checkpoints", ignore_errors=True)
    limit = timedelta(seconds=10 * nodes.limit_s)
    store = dist.PrefixStore(nodes.key("files"), nodes.open_store())
    group = {"store": store, "rank": nodes.number, "world_size": nodes.count, "timeout": limit}
    dist.init_process_group("gloo", **group)
    try:
        listed = [files]
        dist.broadcast_object_list(listed)
        for name, size in listed[0]:
            copy_file(nodes, run / name, into / name, size)
    except RuntimeError as error:  # of Gloo
        raise NodeLost(f"a node is gone that the run was copied to or from: {error}") from None
    finally:
        dist.destroy_process_group()


def copy_file(nodes: Nodes, source: Path, target: Path, size: int) -> None:
    """Reads a file on the first node and writes it on the others."""
    if not nodes.first:
        target.parent.mkdir(parents=True, exist_ok=True)
    with open(source if nodes.first else target, "rb" if nodes.first else "wb") as file:
        for start in range(0, size, PIECE):
            piece = torch.empty(min(PIECE, size - start), dtype=torch.uint8)
            if nodes.first:
                file.readinto(piece.numpy())
            dist.broadcast(piece, 0)
            if not nodes.first:
                file.write(piece.numpy())


def agree(nodes: Nodes, config: Config) -> None:
    """Waits until every node knows what it is to run. Raises UserError, on all, where they do
    not mean the same."""
    if not nodes.several:
        return
    mine = meant(config)
    if not nodes.first:
        nodes.tell({"kind": "settings", "settings": mine})
        nodes.run = nodes.wait_for("agreed")[0]["run"]
        return
    for node, word in nodes.wait_for("settings").items():
        found = [
            f"{flag_of(name)} {value or 'empty'} (not {mine[name] or 'empty'})"
            for name, value in word["settings"].items()
            if value != mine[name]
        ]
        other = f"{nodes.names[node]} has {', '.join(found)} unlike {nodes.names[0]}"
        same = "give all nodes the same flags and files, on machines that are alike"
        require(not found, f"{other}: {same}")


def meant(config: Config) -> dict[str, str]:
    """Returns what must be the same on all nodes, by the names of settings."""
    own = OWN[:-1] if config.env.lanes else OWN
    mine = {name: str(setting(config, name)) for name in STAGE_OF if name not in own}
    return mine | {name: contents(setting(config, name)) for name in ("checkpoint", "adapter")}


def contents(path: Path | None) -> str:
    """Names what the files of a checkpoint hold. Of large ones 256 pieces are read: actors compare
    what they train (`Ranks.check_alike`), but not what they leave to rollout workers."""
    if path is None:
        return ""
    path = checkpoint.absolute(path)
    with contextlib.suppress(UserError):  # it is another project's
        path = checkpoint.find(path)
    found = hashlib.sha256()
    for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            for place in sorted({size * n // 256 for n in range(256)}):
                stream.seek(place)
                found.update(stream.read(2**16))
        found.update(str(size).encode())
    return f"contents {found.hexdigest()[:8]}"


def about_this_program() -> dict:
    """Returns the host's name, and what must be the same on all nodes."""
    import numpy

    code = hashlib.sha256()
    for folder in (ROOT, *(ROOT / name for name in ("envs", "models", "planning"))):
        for file in sorted(folder.rglob("*.py") if folder != ROOT else folder.glob("*.py")):
            code.update(file.read_bytes())
    versions = {"Python": platform.python_version(), "torch": torch.__version__}
    versions |= {"numpy": numpy.__version__, "vla3": code.hexdigest()[:8]}
    return versions | {"host": socket.gethostname()}
