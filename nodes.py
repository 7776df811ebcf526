"""The nodes of a run: launchers that torchrun starts on several machines, and what they say.

    torchrun --nnodes N --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint HOST:PORT train.py …

A node is closed: its workers share slots, queues and weights among themselves. Between nodes travel
gradients (ranks.py) and the launchers' words, through torchrun's store: the others' words go to the
first node, and the first one's to all. The first node decides, saves and reports.

Start at `Nodes.arrange`. Docs: docs/nodes.md. Left out: nodes that come and go while a run lasts.
"""

import contextlib
import ctypes
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import socket
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import machine
from checks import flag_of
from command_line import gives, value_of, without
from config import ROOT, STAGE_OF, Config, completed, run_path, setting
from errors import UserError, require
from ranks import Meeting
from run_folder import checkpoints, newest_version, pack_spans, take_spans

BEAT_S = 1.0  # seconds between two signs of life of a node
LOOK_S = 0.1  # seconds between two looks for words
FAREWELL_S = 10.0  # that the first node stays for the others, which may need its machine's store
SPANS_S = 30.0  # that it waits for the spans of others
CLOCKS_S = 10.0  # that the clocks of two nodes may differ
PINGS = 5  # of a clock; the quickest one counts
PIECE = 2**26  # bytes of a file that travel at a time
# What may differ between nodes: where files lie, and how many workers there are of simulators whose
# lanes have one env each; those of others say which envs make a lane.
OWN = ("checkpoint", "adapter", "tokenizer", "run", "resume", "resume_or_start", "node")
OWN += ("env_workers",)


class Ended(Exception):
    """The run has ended on another node; its arguments are those of `follow.End`."""

    def __init__(self, message: str, status: int = 1, ratio: str = ""):
        super().__init__(message)
        self.status = status
        self.ratio = ratio


class NodeLost(Exception):
    """A node is silent; the message names it."""


class Nodes:
    """This node among those of the run. One that is alone has nobody to talk to."""

    def __init__(
        self,
        number: int = 0,
        count: int = 1,
        address: tuple[str, int] | None = None,
        job: str = "",
    ):
        """number: torchrun's, until nodes have met; address: of torchrun's store, which other jobs
        may have, too; job: its --rdzv-id."""
        self.job = job
        self.number = number
        self.count = count
        self.address = address
        self.names = [f"node {n}" for n in range(count)]
        self.meets = 0  # how many starts of launchers this job has had, this one included
        self.clock = 0.0  # seconds to be added to monotonic time here to have the first node's
        self.limit_s = 120.0  # of silence
        self.run = ""  # the folder on the first node's disk
        self.inbox: deque[tuple[int, dict]] = deque()
        self.outbox: deque[dict] = deque()
        self.beats: dict[int, tuple[str, float]] = {}  # the newest sign of life, and when it came
        self.work = 0.0  # what the workers here have done so far, in any measure
        self.works: dict[int, float] = {}  # and those of others
        self.trouble = ""  # why there are no more words
        self.leaving = threading.Event()
        self.thread = threading.Thread(target=self.talk, daemon=True, name="nodes")

    @staticmethod
    def here() -> "Nodes":
        """Returns what torchrun says of this process: alone, where it has not started it. Raises
        UserError."""
        told = os.environ
        if "TORCHELASTIC_RUN_ID" not in told:
            world = told.get("WORLD_SIZE", "1")
            several = f"WORLD_SIZE is {world}, and no torchrun has started this process"
            require(world == "1", f"{several}: start it by torchrun, or unset WORLD_SIZE")
            return Nodes()
        launchers = told["LOCAL_WORLD_SIZE"]
        one = f"--nproc-per-node {launchers} starts {launchers} launchers on a machine"
        require(launchers == "1", f"{one}: give 1, for a launcher starts its workers itself")
        unshared = "torchrun's store is not shared: unset TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
        require(told["TORCHELASTIC_USE_AGENT_STORE"] == "True", unshared)
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: torchrun is gone
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # until workers start
        address = told["MASTER_ADDR"], int(told["MASTER_PORT"])
        job = told["TORCHELASTIC_RUN_ID"]
        return Nodes(int(told["RANK"]), int(told["WORLD_SIZE"]), address, job)

    @property
    def first(self) -> bool:
        return self.number == 0

    @property
    def several(self) -> bool:
        return self.count > 1

    @property
    def name(self) -> str:
        return self.names[self.number]

    @property
    def others(self) -> list[int]:
        """Those whose words come here."""
        return list(range(1, self.count)) if self.first else [0]

    def meeting(self, file: Path) -> Meeting:
        """Says where the actor workers of this start meet."""
        if not self.several:
            return Meeting(file)
        return Meeting(file, self.address, f"{self.job}/{self.key('actors')}")

    def key(self, *words: object) -> str:
        """Returns the store's key of something of this start."""
        return "/".join(["vla3", str(self.meets), *map(str, words)])

    def open_store(self) -> dist.Store:
        limit = timedelta(seconds=self.limit_s)
        options = {"is_master": False, "wait_for_workers": False, "timeout": limit}
        return dist.PrefixStore(self.job, dist.TCPStore(*self.address, **options))

    # ---------------------------------------------------------------- before the workers start

    def arrange(self, args: list[str]) -> list[str]:
        """Meets the other nodes. Returns the flags that this one is to go on with: a run that is
        resumed is copied from the first node's disk, and a job that torchrun has started again
        continues its run. Raises UserError, Ended, NodeLost."""
        if self.address is None:
            return args
        limit = value_of(args, "--timeout-s") or ""
        if limit.replace(".", "", 1).isdecimal():  # else `parse` says what is wrong with it
            self.limit_s = float(limit)
        store = self.open_store()
        before = store.get("vla3/run").decode() if store.check(["vla3/run"]) else ""
        named = value_of(args, "--resume", "--resume-or-start") or before
        if before and not gives(args, "--resume", "--resume-or-start"):
            args = [*without(args, "--run"), "--resume-or-start", before]
        saved = newest_version(run_path(named)) if named else None
        hellos = self.meet(store, -1 if saved is None else saved)
        self.check_alike(hellos)
        if not self.several:
            return args
        self.thread.start()
        if self.first:
            self.tell({"kind": "resumes", "run": named, "from": saved})
            begins = saved
        else:
            begins = self.wait_for("resumes")[0]["from"]
        args = without(args, "--run") if not self.first else args
        if begins is None or not named:
            flags = "--resume", "--resume-or-start"
            return args if self.first else without(args, *flags)
        self.copy_run(run_path(named), begins)
        if self.first:
            return args
        args = without(args, "--resume", "--resume-or-start")
        return [*args, "--resume", str(self.folder(named))]

    def meet(self, store: dist.Store, saved: int) -> list[dict]:
        """Waits for all nodes, and numbers them: the first one is the one whose disk has the newest
        checkpoint of the run, or else torchrun's first. Returns what each said of itself.

        saved: the version of that checkpoint, -1 where there is none. Raises UserError."""
        mine = about_this_program() | {"id": uuid.uuid4().hex, "saved": saved}
        store.set(f"vla3/hello/{self.number}", json.dumps(mine))
        hellos = self.gather(store) if self.number == 0 else self.answer(store, mine["id"])
        self.compare_clocks(store, hellos)
        newest = max(range(self.count), key=lambda node: (hellos[node]["saved"], -node))
        order = [newest, *(node for node in range(self.count) if node != newest)]
        self.number = order.index(self.number)
        self.names = [f"node {n} ({hellos[node]['host']})" for n, node in enumerate(order)]
        self.clock -= hellos[newest]["clock"]
        return [hellos[node] for node in order]

    def gather(self, store: dist.Store) -> list[dict]:
        """Says again and again whom this node has seen, until all of them have answered: what the
        store holds may be of an earlier start."""
        self.meets = store.add("vla3/meets", 1)
        hellos = [f"vla3/hello/{node}" for node in range(self.count)]
        answers = [self.key("here", node) for node in range(1, self.count)]
        late = time.monotonic() + self.limit_s
        while not all(store.check([answer]) for answer in answers):
            seen = [json.loads(store.get(key)) if store.check([key]) else {} for key in hellos]
            store.set("vla3/seen", json.dumps([self.meets, seen]))
            away = [node for node in range(1, self.count) if not store.check([answers[node - 1]])]
            missing = f"of {self.count} nodes number {machine.ranges(away)} has not come"
            limit = f"within {self.limit_s:.0f} s"
            does = "does torchrun run there, with this endpoint?"
            require(time.monotonic() < late, f"{missing} {limit}: {does}")
            time.sleep(LOOK_S)
        seen = [json.loads(store.get(key)) for key in hellos]
        store.set(self.key("all"), json.dumps(seen))
        return seen

    def answer(self, store: dist.Store, mine: str) -> list[dict]:
        """Answers when torchrun's first node has seen this one, and waits until it has seen all."""
        late = time.monotonic() + self.limit_s + FAREWELL_S
        while not (self.meets and store.check([self.key("all")])):
            if store.check(["vla3/seen"]):
                meets, seen = json.loads(store.get("vla3/seen"))
                if seen[self.number].get("id") == mine:
                    self.meets = meets
                    store.set(self.key("here", self.number), "")
            first = f"torchrun's first node, or another of {self.count}, has not come within"
            limit = f"{self.limit_s:.0f} s: does train.py run there?"
            require(time.monotonic() < late, f"{first} {limit}")
            time.sleep(LOOK_S)
        return json.loads(store.get(self.key("all")))

    def compare_clocks(self, store: dist.Store, hellos: list[dict]) -> None:
        """Adds to what nodes said of themselves how far torchrun's first node's clocks are ahead of
        theirs, in seconds: "clock", the monotonic one, and "date"."""
        for node in range(1, self.count):
            found = []
            for ping in range(PINGS):
                asked = self.key("ping", node, ping)
                answered = self.key("pong", node, ping)
                if self.number == 0:
                    store.wait([asked])
                    store.set(answered, json.dumps([time.monotonic(), time.time()]))
                elif self.number == node:
                    before = time.monotonic()
                    date = time.time()
                    store.set(asked, "")
                    theirs = json.loads(store.get(answered))
                    took = time.monotonic() - before
                    found.append([took, theirs[0] - before - took / 2, theirs[1] - date - took / 2])
            if self.number == node:
                store.set(self.key("clock", node), json.dumps(min(found)))
            _, clock, date = json.loads(store.get(self.key("clock", node)))
            hellos[node] |= {"clock": clock, "date": date}
        hellos[0] |= {"clock": 0.0, "date": 0.0}
        self.clock = hellos[self.number]["clock"]

    def check_alike(self, hellos: list[dict]) -> None:
        """Raises UserError, the same one on every node, where nodes run different programs, or
        their clocks are apart."""
        first = hellos[0]
        for name, hello in zip(self.names, hellos, strict=True):
            for what in ("Python", "torch", "numpy", "vla3"):
                found = f"{name} has {what} {hello[what]}, and {self.names[0]} {first[what]}"
                require(hello[what] == first[what], f"{found}: install the same on all nodes")
            apart = first["date"] - hello["date"]
            ahead = "ahead of" if apart > 0 else "behind"
            clock = f"the clock of {name} is {abs(apart):.0f} s {ahead} that of {self.names[0]}"
            require(abs(apart) < CLOCKS_S, f"{clock}: synchronise them (NTP)")

    def folder(self, run: str) -> Path:
        """Returns where this node keeps what its workers need of a run: the run's own folder on the
        first node, elsewhere one of its own, even where nodes share a disk."""
        path = run_path(run)
        if self.first:
            return path
        runs = ROOT / "runs"
        # Runs elsewhere may have the same name.
        other = hashlib.sha256(str(path.parent.absolute()).encode()).hexdigest()[:8]
        name = path.name if path.parent == runs else f"{path.name}-{other}"
        return runs / f".{name}.node-{self.number}"

    def copy_run(self, run: Path, version: int) -> None:
        """Copies from the first node to the others what a resumed run needs: its newest checkpoint,
        and the small files beside."""
        files = []
        if self.first:
            parts = [path for path in run.iterdir() if path.suffix in (".json", ".jsonl", ".model")]
            parts = [path for path in parts if path.name not in ("trace.json", "tuning.json")]
            parts += [path for path in checkpoints(run)[-1].rglob("*") if path.is_file()]
            files = [(str(path.relative_to(run)), path.stat().st_size) for path in parts]
        into = self.folder(str(run))
        if not self.first:
            shutil.rmtree(into / "checkpoints", ignore_errors=True)
        limit = timedelta(seconds=10 * self.limit_s)
        store = dist.PrefixStore(self.key("files"), self.open_store())
        group = {"store": store, "rank": self.number, "world_size": self.count, "timeout": limit}
        dist.init_process_group("gloo", **group)
        try:
            listed = [files]
            dist.broadcast_object_list(listed)
            for name, size in listed[0]:
                self.copy_file(run / name, into / name, size)
        except RuntimeError as error:  # of Gloo
            raise NodeLost(f"a node is gone that the run was copied to or from: {error}") from None
        finally:
            dist.destroy_process_group()

    def copy_file(self, source: Path, target: Path, size: int) -> None:
        """Reads a file on the first node and writes it on the others."""
        if not self.first:
            target.parent.mkdir(parents=True, exist_ok=True)
        with open(source if self.first else target, "rb" if self.first else "wb") as file:
            for start in range(0, size, PIECE):
                piece = torch.empty(min(PIECE, size - start), dtype=torch.uint8)
                if self.first:
                    file.readinto(piece.numpy())
                dist.broadcast(piece, 0)
                if not self.first:
                    file.write(piece.numpy())

    def placed(self, config: Config) -> Config:
        """Returns the settings with this node's place in them."""
        self.limit_s = config.train.timeout_s
        return completed(config, node=self.number, nodes=self.count)

    def agree(self, config: Config) -> None:
        """Waits until every node knows what it is to run. Raises UserError, on all, where they do
        not mean the same."""
        if not self.several:
            return
        own = OWN[:-1] if config.env.lanes else OWN
        mine = {name: str(setting(config, name)) for name in STAGE_OF if name not in own}
        mine |= {name: contents(setting(config, name)) for name in ("checkpoint", "adapter")}
        if not self.first:
            self.tell({"kind": "settings", "settings": mine})
            self.run = self.wait_for("agreed")[0]["run"]
            return
        for node, word in self.wait_for("settings").items():
            for name, value in word["settings"].items():
                found = f"{self.names[node]} has {flag_of(name)} {value or 'empty'}"
                other = f"and {self.names[0]} {mine[name] or 'empty'}"
                same = "give all nodes the same flags and files, on machines that are alike"
                require(value == mine[name], f"{found}, {other}: {same}")

    def name_run(self, run: str) -> None:
        """Tells the others which folder the first node has opened, and remembers it for a job that
        torchrun starts again."""
        self.run = run
        if self.address and self.first:
            self.open_store().set("vla3/run", run)
        if self.several and self.first:
            self.tell({"kind": "agreed", "run": run})

    # ---------------------------------------------------------------- words

    def tell(self, word: dict) -> None:
        """Says a word, with a "kind", to the first node, or to all where this is the first."""
        if self.several:
            self.outbox.append(word)

    def news(self) -> Iterator[tuple[int, dict]]:
        """Yields who said what since the last time. Raises Ended, or NodeLost."""
        while self.inbox:
            node, word = self.inbox.popleft()
            if word["kind"] == "end":
                raise Ended(word["message"], word["status"], word["ratio"])
            yield node, word
        if self.trouble and not self.leaving.is_set():
            raise NodeLost(self.trouble)

    def wait_for(
        self, kind: str, limit_s: float = math.inf, found: dict[int, dict] | None = None
    ) -> dict[int, dict]:
        """Waits for a word of this kind from all whose words come here, and returns it by node.
        found: where it is put, for what there is when Ended or NodeLost is raised."""
        found = {} if found is None else found
        for_later = []
        late = time.monotonic() + min(limit_s, 10 * self.limit_s)
        while len(found) < len(self.others):
            for node, word in self.news():
                if word["kind"] == kind and node not in found:
                    found[node] = word
                else:
                    for_later.append((node, word))
            missing = ", ".join(self.names[node] for node in self.others if node not in found)
            if time.monotonic() > late:
                raise NodeLost(f"{missing} did not come to say {kind!r}")
            time.sleep(0.02)
        self.inbox.extendleft(for_later[::-1])
        return found

    def talk(self) -> None:
        """Carries words and signs of life, in a thread of its own, until this node leaves."""
        try:
            store = self.open_store()
            heard = dict.fromkeys(self.others, 0)  # words taken of each
            self.beats = {node: ("", time.monotonic()) for node in self.others}
            told = 0
            beaten = looked = -1e9
            while not (self.leaving.is_set() and not self.outbox):
                now = time.monotonic()
                if now - looked > self.limit_s / 4:  # this process was suspended
                    self.beats = {node: (beat, now) for node, (beat, _) in self.beats.items()}
                looked = now
                while self.outbox:
                    store.set(self.key(self.number, told), json.dumps(self.outbox[0]))
                    self.outbox.popleft()
                    told += 1
                if now - beaten > BEAT_S:
                    work = self.work + (self.work_elsewhere if self.first else 0.0)
                    store.set(self.key("alive", self.number), f"{now} {work}")
                    beaten = now
                for node in self.others:
                    heard[node] = self.hear(store, node, heard[node])
                    self.beats[node] = self.feel(store, node, *self.beats[node])
                self.leaving.wait(LOOK_S)
        except Exception as error:  # what torch says of a store that is gone has several kinds
            self.trouble = self.trouble or self.gone(error)

    def gone(self, error: Exception) -> str:
        """Says so where torchrun's store does not answer."""
        host, port = self.address
        gone = f"torchrun's store on {host}, port {port}, is gone: has torchrun ended there?"
        return f"{gone} ({error})"[:300]

    def hear(self, store: dist.Store, node: int, count: int) -> int:
        """Takes in the words of a node after the first `count`. Returns how many it has said."""
        while store.check([self.key(node, count)]):
            key = self.key(node, count)
            self.inbox.append((node, json.loads(store.get(key))))
            if self.first:  # the first node's words are for several
                store.delete_key(key)
            count += 1
        return count

    def feel(self, store: dist.Store, node: int, beat: str, when: float) -> tuple[str, float]:
        """Returns a node's newest sign of life, and when it was seen first. Raises NodeLost."""
        key = self.key("alive", node)
        now = store.get(key).decode() if store.check([key]) else ""
        if now != beat:
            self.works[node] = float(now.split()[1])
            return now, time.monotonic()
        if time.monotonic() - when > self.limit_s:
            self.trouble = f"{self.names[node]} is silent for {self.limit_s:.0f} s: is it gone?"
            raise NodeLost(self.trouble)
        return beat, when

    @property
    def work_elsewhere(self) -> float:
        """Returns a number that grows while workers of other nodes do something: a node may wait
        long for gradients of a slower one."""
        return sum(list(self.works.values()))

    def silent(self) -> str:
        """Names the nodes that have given no sign of life for some seconds, or ""."""
        lately = time.monotonic() - 4 * BEAT_S
        gone = [self.names[node] for node, (_, when) in self.beats.items() if when < lately]
        return f"{', '.join(gone)} is silent: is it gone?" if gone else ""

    # ---------------------------------------------------------------- the end

    def gather_spans(self, folder: Path) -> None:
        """Brings the spans of all nodes' workers to the first node's .spans/."""
        if not self.several or self.trouble:
            return
        store = self.open_store()
        if not self.first:
            pieces = pack_spans(folder, self.count)
            for number, piece in enumerate(pieces):
                store.set(self.key("spans", self.number, number), piece)
            self.tell({"kind": "spans", "pieces": len(pieces), "clock": self.clock})
            return
        found: dict[int, dict] = {}
        late = time.monotonic() + SPANS_S
        with contextlib.suppress(NodeLost):
            while len(found) < len(self.others):
                with contextlib.suppress(Ended):  # one that has failed sends them, too
                    self.wait_for("spans", late - time.monotonic(), found)
        for node, word in found.items():
            keys = [self.key("spans", node, number) for number in range(word["pieces"])]
            said = take_spans(folder, node, [store.get(key) for key in keys], word["clock"])
            if said:
                print(said, flush=True)
        if away := [self.names[node] for node in self.others if node not in found]:
            print(f"trace.json lacks {', '.join(away)}", flush=True)

    def end(self, message: str, status: int, ratio: str = "") -> None:
        """Tells the other nodes how this one has ended."""
        self.tell({"kind": "end", "message": message, "status": status, "ratio": ratio})

    def status(self, status: int) -> int:
        """Returns what to end with where that is a run's status. torchrun would start an
        interrupted run again."""
        again = self.address and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
        return 0 if status == 130 and again else status

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Ends all nodes where this one ends with an error, and this one where another does."""
        try:
            yield
        except KeyboardInterrupt:
            self.end("interrupted before anything was trained", 130)
            raise
        except Ended as end:
            self.end(str(end), end.status)
            print(end, file=sys.stderr if end.status else sys.stdout, flush=True)
            raise SystemExit(end.status) from None
        except (NodeLost, dist.DistError) as lost:
            said = str(lost) if isinstance(lost, NodeLost) else self.gone(lost)
            self.end(f"error: {said}", 1)
            print(f"error: {said}", file=sys.stderr, flush=True)
            raise SystemExit(1) from None
        except SystemExit as left:
            self.end(f"{self.name} has ended: what it prints says why", left.code or 0)
            raise
        except BaseException as error:
            said = str(error) if isinstance(error, UserError) else repr(error)
            self.end(f"error: {self.name}: {said}", 2)
            raise
        finally:
            self.close()

    def close(self) -> None:
        """Says farewell, and waits for that of the others: any machine may have the store. The
        first node is the last to say it."""
        if not self.thread.is_alive():
            return
        if not self.first:
            self.tell({"kind": "bye"})
        late = time.monotonic() + FAREWELL_S
        left: set[int] = set()
        while len(left) < len(self.others) and time.monotonic() < late and not self.trouble:
            while self.inbox:
                node, word = self.inbox.popleft()
                if word["kind"] == "bye":
                    left.add(node)
            time.sleep(0.02)
        if self.first:
            self.tell({"kind": "bye"})
        self.leaving.set()
        self.thread.join(FAREWELL_S)


def contents(path: Path | None) -> str:
    """Names what the files of a checkpoint hold. Of large ones 256 pieces are read: actors compare
    what they train (`Ranks.check_alike`), but not what they leave to rollout workers."""
    if path is None:
        return ""
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
