"""The nodes of a run: launchers that torchrun starts on several machines, and what they say.

    torchrun --nnodes N --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint HOST:PORT train.py …

A node is closed: its workers share slots, queues and weights among themselves. Between nodes travel
gradients (ranks.py) and the launchers' words, through torchrun's store: the others' words go to the
first node, and the first one's to all. The first node decides, saves and reports.

How they meet: joining.py. Docs: docs/nodes.md. Left out: nodes that come and go while a run lasts.
"""

import contextlib
import ctypes
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from config import ROOT, Config, completed, run_path
from errors import UserError, require
from ranks import Meeting
from run_folder import pack_spans, take_spans

BEAT_S = 1.0  # seconds between two signs of life of a node
LOOK_S = 0.1  # seconds between two looks for words
FAREWELL_S = 10.0  # that the first node stays for the others, which may need its machine's store
SPANS_S = 30.0  # that it waits for the spans of others


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
        self.shared = False  # whether all see the checkpoint that is resumed
        self.copied: Path | None = None  # a run that was copied to this node
        self.inbox: deque[tuple[int, dict]] = deque()
        self.outbox: deque[dict] = deque()
        self.beats: dict[int, tuple[str, float]] = {}  # the newest sign of life, and when it came
        self.work = 0.0  # what the workers here have done so far, in any measure
        self.works: dict[int, float] = {}  # and those of others
        self.looked = self.asked = 0.0  # monotonic seconds of the newest look, and of `news`
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

    def folder(self, run: str) -> Path:
        """Returns where this node keeps what its workers need of a run: the run's own folder on the
        first node, elsewhere one of its own, even where nodes share a disk."""
        path = run_path(run)
        if self.first:
            return path
        runs = ROOT / "runs"
        parent = path.parent if os.access(path.parent, os.W_OK) else runs
        # Runs elsewhere may have the same name.
        other = hashlib.sha256(str(path.parent.absolute()).encode()).hexdigest()[:8]
        name = path.name if path.parent == runs else f"{path.name}-{other}"
        return parent / f".{name}.node-{self.number}"

    def placed(self, config: Config) -> Config:
        """Returns the settings with this node's place in them. Their time limit counts from now."""
        self.limit_s = config.train.timeout_s
        return completed(config, node=self.number, nodes=self.count)

    def name_run(self, run: str) -> None:
        """Tells the others which folder the first node has opened, and remembers it for a job that
        torchrun starts again."""
        self.run = run
        if self.address and self.first:
            known = {"run": run, "folder": run_path(run).stat().st_ino}
            self.open_store().set("vla3/run", json.dumps(known))
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
        # The store may not answer, and the thread wait for it without end.
        now = time.monotonic()
        if now - self.asked > self.limit_s / 4:  # this process did something else, or was suspended
            self.looked = now
        self.asked = now
        if self.thread.is_alive() and now - self.looked > self.limit_s:
            self.trouble = f"torchrun's store on {self.address[0]} does not answer"
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
            beaten = -math.inf
            while not (self.leaving.is_set() and not self.outbox):
                now = time.monotonic()
                if now - self.looked > self.limit_s / 4:  # this process was suspended
                    self.beats = {node: (beat, now) for node, (beat, _) in self.beats.items()}
                self.looked = now
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
        return f"{', '.join(gone)} gave no sign of life: is it gone?" if gone else ""

    # ---------------------------------------------------------------- the end

    def gather_spans(self, folder: Path) -> None:
        """Brings the spans of all nodes' workers to the first node's .spans/, or says what is
        missing."""
        if not self.several or self.trouble:
            return
        try:
            self.exchange_spans(folder, self.open_store())
        except dist.DistError:  # a run that has ended well is not to fail now
            print("trace.json has one node: torchrun's store is gone", file=sys.stderr, flush=True)

    def exchange_spans(self, folder: Path, store: dist.Store) -> None:
        # Others put theirs into the store, and say so.
        if not self.first:
            pieces = pack_spans(folder, self.count)
            for number, piece in enumerate(pieces):
                store.set(self.key("spans", self.number, number), piece)
            self.tell({"kind": "spans", "pieces": len(pieces), "clock": self.clock})
            return

        # The first node waits for them.
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
        """Returns the exit status of a run that ended with `status`. torchrun would start one again
        that was interrupted."""
        again = self.address and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
        return 0 if status == 130 and again else status

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Ends all nodes where this one ends with an error, and this one where another does."""
        try:
            with self.dropping_copies():
                yield
        except KeyboardInterrupt:
            self.end("interrupted before anything was trained", 130)
            print("interrupted", file=sys.stderr)
            raise SystemExit(self.status(130)) from None
        except Ended as end:
            self.end(str(end), end.status)
            print(end, file=sys.stderr if end.status else sys.stdout, flush=True)
            raise SystemExit(self.status(end.status)) from None
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
            whose = "" if said.startswith("node ") else f"{self.name}: "
            self.end(f"error: {whose}{said}", 2)
            raise
        finally:
            self.close()

    @contextlib.contextmanager
    def dropping_copies(self) -> Iterator[None]:
        """Removes what was copied to this node where the run fails before its workers start."""
        try:
            yield
        except BaseException:
            if self.copied:
                shutil.rmtree(self.copied, ignore_errors=True)
            raise

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
        if not self.trouble:
            self.thread.join(FAREWELL_S)
