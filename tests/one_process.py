"""Many workers in one process: each is a thread that runs only while it holds the baton, and the
order of everything that happens is drawn from one seed.

Workers speak through `Pipe`s, which lose, double and delay records; and those that may die do so at
random, wherever `World.point` is called.
"""

import random
import threading
from collections.abc import Callable

from channel import WAKE, Record


class Killed(BaseException):
    """Ends a worker's thread. Nothing in the product catches it."""


class Thread:
    """One worker. The world resumes it; it runs until it pauses, ends or is killed."""

    def __init__(self, world: "World", name: str, target: Callable[[], None]):
        self.world = world
        self.name = name
        self.target = target
        self.turn = threading.Semaphore(0)
        self.doomed = False  # it is killed when it is resumed
        self.ended = False
        self.killed = False
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self.run, daemon=True, name=name)
        self.thread.start()

    def run(self) -> None:
        self.turn.acquire()
        try:
            if not self.doomed:
                self.target()
        except Killed:
            pass
        except BaseException as error:
            self.error = error
        self.killed = self.doomed
        self.ended = True
        self.world.baton.release()

    def resume(self) -> None:
        """Called by the world: returns when the thread has paused or ended."""
        self.turn.release()
        self.world.baton.acquire()

    def pause(self) -> None:
        self.world.baton.release()
        self.turn.acquire()
        if self.doomed:
            raise Killed

    def die(self) -> None:
        self.doomed = True
        raise Killed


class World:
    """Draws who runs next and what arrives next. It is the clock, too."""

    def __init__(self, seed: int, *, wakes_lost: float, doubled: float, kills: int):
        """wakes_lost, doubled: probabilities, of a WAKE and of any record; kills: how many workers
        die at most."""
        self.random = random.Random(seed)
        self.wakes_lost = wakes_lost
        self.doubled = doubled
        self.kills = kills
        self.deliveries = self.random.choice((0.1, 0.4, 0.7))  # their share of all steps
        self.baton = threading.Semaphore(0)
        self.threads: dict[str, Thread] = {}
        self.mortal: set[str] = set()  # names of those who may be killed
        self.pipes: list[Pipe] = []
        self.running: Thread | None = None
        self.now = 0.0

    # ---------------------------------------------------------------- the module `time`

    def monotonic(self) -> float:
        self.now += 1e-4
        return self.now

    def sleep(self, seconds: float) -> None:
        self.running.pause()

    # ---------------------------------------------------------------- threads

    def start(self, name: str, target: Callable[[], None], mortal: bool = False) -> None:
        self.threads[name] = Thread(self, name, target)
        if mortal:
            self.mortal.add(name)

    def point(self, risk: float = 0.002) -> None:
        """A place where the running worker may be killed, with this probability, or others may
        run."""
        thread = self.running
        if thread.name in self.mortal and self.kills and self.random.random() < risk:
            self.kills -= 1
            thread.die()
        if self.random.random() < 0.1:
            thread.pause()

    def step(self) -> list[str]:
        """Lets one thing happen. Returns the names of workers that it has killed."""
        waiting = [(pipe, sender) for pipe in self.pipes for sender in pipe.flying]
        if waiting and self.random.random() < self.deliveries:
            pipe, sender = self.random.choice(waiting)
            if not sender.ended or self.random.random() < 0.05:  # what the dead wrote comes late
                pipe.deliver(sender)
            return []
        alive = [thread for thread in self.threads.values() if not thread.ended]
        thread = self.running = self.random.choice(alive)
        thread.resume()
        if thread.error is not None:
            raise thread.error
        if not thread.killed:
            return []
        for pipe in self.pipes:
            pipe.cut(thread)
        return [thread.name]

    def end(self) -> None:
        for thread in self.threads.values():
            if not thread.ended:
                thread.doomed = True
                thread.resume()
            thread.thread.join()


class Pipe:
    """Stands for `channel.IndexQueue`. Records of one sender keep their order, as in a pipe; those
    of different senders do not, nor do those of a worker and of its replacement."""

    def __init__(self, world: World, apart: bool):
        """apart: a copy may arrive later than its original; else it comes together with it."""
        self.world = world
        self.apart = apart
        self.flying: dict[
            str, list[list[Record]]
        ] = {}  # by sender: what it wrote and is on its way
        self.arrived: list[Record] = []
        world.pipes.append(self)

    def close_writer(self) -> None:
        """Threads share it."""

    def put(self, records: list[Record]) -> None:
        world = self.world
        world.point(risk=0.01)
        writes: list[list[Record]] = [[]]
        for record in records:
            if record.kind == WAKE and world.random.random() < world.wakes_lost:
                continue
            writes[-1].append(record)
            if world.random.random() < world.doubled:
                if self.apart and world.random.random() < 0.5:
                    writes.append([])
                writes[-1].append(record)
        writes = [write for write in writes if write]
        if writes:
            self.flying.setdefault(world.running, []).extend(writes)
        world.point(risk=0.01)

    def deliver(self, sender: Thread) -> None:
        self.arrived += self.flying[sender].pop(0)
        if not self.flying[sender]:
            del self.flying[sender]

    def cut(self, sender: Thread) -> None:
        """Loses a part, or all, of what a worker wrote before it was killed."""
        writes = self.flying.get(sender, [])
        del writes[self.world.random.randint(0, len(writes)) :]
        if not writes:
            self.flying.pop(sender, None)

    def get(self, timeout: float | None) -> list[Record]:
        """Returns what has arrived; waits at most until this worker's next turn."""
        if timeout != 0 and not self.arrived:
            self.world.running.pause()
        else:
            self.world.point()
        arrived = self.arrived
        self.arrived = []
        return arrived
