"""However a run ends, nothing of it is left; and whoever ended it is named. (`cli` checks for
processes and /dev/shm.)

And it does not end where a simulator fails: real faults in real env workers, with `faulty.py` and
by signals.
"""

import builtins
import json
import os
import re
import resource
import signal
import time
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL, assert_balanced
from test_channel import SPEC, open_files
from test_html_report import read as read_page

import processes
from channel import Counters, IndexQueue, SlotPool
from config import MOST_WORKERS, ROOT, STAGE_OF, run_path
from errors import UserError
from follow import Follower
from metrics import Meter, columns
from nodes import Nodes
from processes import START_UP, Crew, Failure, Interrupts, Job, WorkerFailed, may_pass
from run_folder import read_metrics

QUICK = (
    "--model emulated --env emulated --tasks 0 --env-workers 1 --envs 4 --batch 4 --minibatch 4 "
    "--micro-batch 4 --segment 1 "
    "--update-epochs 1 --eval-envs 0 --eval-every 0 --iterations 1000000 --no-trace"
)
ENDLESS = f"{SMALL} --ratio 2:1 --iterations 100000 --checkpoint-every 100000"


@pytest.fixture
def endless(cli, tiny_checkpoint, tmp_path):
    """A run that trains for ever, on two env workers; returns it once it has trained an
    iteration."""

    def start(flags: str = "", wait: bool = True):
        process = cli(
            "train.py", f"{ENDLESS} --checkpoint {tiny_checkpoint} --run {tmp_path / 'x'} {flags}"
        )
        if wait:
            process.wait_for(tmp_path / "x" / "metrics.jsonl")
        return process

    return start


def assert_clean_end(run: Path, output: str) -> None:
    assert "Traceback" not in output, output
    assert (
        not (run / ".spans").exists()
        and json.loads((run / "trace.json").read_text())["traceEvents"]
    )
    page = read_page(run)
    # What workers did shows without an iteration, too, but not of a run that was interrupted.
    soon = f"; python -m metrics {run} adds what takes longer" in output
    assert soon == ("interrupted; saved" in output)
    pictures = (2 if read_metrics(run) else 0) + (not soon)
    assert len(page.all("img")) == pictures and "the run goes on" not in page.text


def test_ctrl_c_saves_and_says_where(endless, tmp_path):
    process = endless("--actor-workers 2")
    process.process.send_signal(signal.SIGINT)
    status, output = process.finish(timeout=30)
    process.assert_nothing_left()
    assert status == 130, output
    saved, resume = re.search(
        r"interrupted; saved (\S+); continue with: python train.py --resume (\S+)", output
    ).groups()
    saved = Path(saved)
    assert run_path(resume) == tmp_path / "x"  # the advice works
    assert saved.parent == tmp_path / "x" / "checkpoints"
    assert {file.name for file in saved.iterdir()} == {
        "model.safetensors",
        "optimizer.pt",
        "state.json",
    }
    assert json.loads((saved / "state.json").read_text())["version"] == int(saved.name) >= 1
    assert_clean_end(tmp_path / "x", output)


def test_ctrl_c_is_heard_where_iterations_are_quicker_than_their_reports(cli, tmp_path):
    process = cli("train.py", f"{QUICK} --checkpoint-every 1000000 --run {tmp_path / 'x'}")
    process.wait_for(tmp_path / "x" / "metrics.jsonl", 100)
    process.process.send_signal(signal.SIGINT)
    status, output = process.finish(timeout=30)
    assert status == 130 and "interrupted; saved" in output, output


def test_a_run_is_trained_by_one_process_at_a_time(cli, tmp_path):
    run = tmp_path / "x"
    process = cli("train.py", f"{QUICK} --checkpoint-every 5 --run {run}")
    process.wait_for(run / "metrics.jsonl", 20)
    status, output = cli("train.py", f"--resume {run}").finish()
    assert (
        status == 2
        and f"error: run {run} is being trained by another process: end that one first" in output
    ), output
    # It goes on unharmed. A line per iteration fills its pipe within seconds, so all are read.
    wanted = len(read_metrics(run)) + 5
    assert any(line.startswith(f"iteration {wanted:4d}/") for line in process.process.stdout)
    process.process.send_signal(signal.SIGINT)
    status, output = process.finish(timeout=30)
    assert status == 130 and "interrupted; saved" in output, output


@pytest.mark.parametrize("words", [[signal.SIGTERM], [signal.SIGUSR1, signal.SIGTERM]])
def test_sigterm_to_all_processes_saves_too(endless, tmp_path, words):
    """As `timeout` and cluster schedulers send it, these also some time after a warning."""
    process = endless()
    for word in words:
        os.killpg(process.process.pid, word)
    status, output = process.finish(timeout=30)
    process.assert_nothing_left()
    assert status == 130 and "interrupted; saved" in output, output
    assert_clean_end(tmp_path / "x", output)


@pytest.mark.parametrize(
    "words, twice",
    [
        (["SIGUSR1", "SIGTERM", "SIGTERM", "SIGHUP"], False),  # as Slurm sends them
        (["SIGTERM", "SIGINT"], False),
        (["SIGINT", "SIGTERM"], False),
        (["SIGINT", "SIGINT"], True),
        (["SIGUSR1", "SIGINT", "SIGTERM", "SIGINT"], True),
    ],
)
def test_only_a_second_ctrl_c_stops_without_saving(monkeypatch, words, twice):
    interrupts = Interrupts()
    for second, word in enumerate(words):
        monkeypatch.setattr("time.monotonic", lambda second=second: float(second))
        interrupts.note(signal.Signals[word], None)
    assert interrupts and interrupts.twice == twice


def test_a_word_that_comes_twice_at_once_is_one(monkeypatch):
    interrupts = Interrupts()
    monkeypatch.setattr("time.monotonic", lambda: 7.0)
    interrupts.note(signal.SIGINT)
    interrupts.note(signal.SIGINT)
    assert not interrupts.twice


def test_what_nohup_has_a_program_ignore_is_not_heard():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in processes.interrupts_heard()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert processes.interrupts_heard() == list(processes.INTERRUPTS)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_whoever_starts_a_run_with_nohup_may_log_out(monkeypatch):
    before = {number: signal.getsignal(number) for number in processes.INTERRUPTS}
    monkeypatch.setattr(processes.forkserver, "ensure_running", lambda: None)
    monkeypatch.setattr(processes.forkserver, "set_forkserver_preload", lambda names: None)
    monkeypatch.setattr(processes.machine, "shorten_temporary", lambda: None)
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setenv("OMP_WAIT_POLICY", "")
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        interrupts = processes.note_interrupts("train", "envs.metaworld")
        assert os.environ["VLA3_PRELOAD"] == "train envs.metaworld"
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert limits[0] == min(limits[1], 65536)
        os.kill(os.getpid(), signal.SIGHUP)
        assert not interrupts
        os.kill(os.getpid(), signal.SIGTERM)
        assert list(interrupts) == [signal.SIGTERM]

        # A terminal that is closed ends a run that was not started so.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        interrupts = processes.note_interrupts()
        os.kill(os.getpid(), signal.SIGHUP)
        assert list(interrupts) == [signal.SIGHUP]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_ctrl_c_twice_ends_a_run_whose_last_checkpoint_is_never_written():
    """A disk may be dead. What has been said before counts more."""
    interrupts = Interrupts()
    news = [False]
    follower = SimpleNamespace(
        interrupts=interrupts,
        reports=SimpleNamespace(poll=lambda: news[0]),
        channels=SimpleNamespace(plane=SimpleNamespace(version=9)),
        config=SimpleNamespace(train=SimpleNamespace(iterations=9)),
        nodes=Nodes(),
        where="",
    )
    interrupts.append(signal.SIGINT)
    assert Follower.interrupt(follower) is None
    interrupts.append(signal.SIGTERM)
    assert Follower.interrupt(follower) is None
    interrupts.append(signal.SIGINT)
    end = Follower.interrupt(follower)
    assert end.status == 130 and end.message == "interrupted twice: stopped without saving"
    news[0] = True
    assert Follower.interrupt(follower) is None


def test_ctrl_c_of_a_terminal_while_workers_start(endless, tmp_path):
    process = endless(wait=False)
    while not process.has_fork_server():
        assert process.process.poll() is None
        time.sleep(0.02)
    time.sleep(0.3)  # the fork server is importing
    process.interrupt_group()
    status, output = process.finish(timeout=30)
    process.assert_nothing_left()
    assert (
        status == 130
        and "interrupted before anything was trained" in output
        and "Traceback" not in output
    ), output


def test_a_killed_launcher_takes_everything_along(endless):
    process = endless()
    alive = process.living()
    assert len(process.workers()) == 4 and len(alive) >= 6  # launcher, fork server, 4 workers
    process.process.kill()
    process.process.wait()
    process.assert_nothing_left()


def test_rollout_workers_that_die_or_hang_are_replaced_and_an_actor_s_end_ends_the_run(
    endless, tmp_path
):
    """A real policy, killed as for want of memory while another one hangs. Every action that is
    trained has the probability that it was executed with: at staleness 0 the ratio is 1."""
    flags = "--timeout-s 12 --rollout-workers 2 --max-staleness 0 --precision float32"
    process = endless(flags, wait=False)
    process.wait_for(tmp_path / "x" / "metrics.jsonl", timeout=120.0)
    workers = process.workers()
    workers[1].kill()  # rollout-0 and rollout-1, after actor-0
    workers[2].suspend()
    wait_until(lambda: {w.pid for w in workers[1:3]}.isdisjoint(w.pid for w in process.workers()))
    wait_until(lambda: len(process.workers()) == 5)
    count = len(read_metrics(tmp_path / "x"))
    process.wait_for(tmp_path / "x" / "metrics.jsonl", lines=count + 3)
    lines = read_metrics(tmp_path / "x")
    assert lines[-1]["restarts"] == 2 and lines[-1]["discarded"] == 0  # nothing is played again
    assert [line["trained_once"] for line in lines] == [12 * line["iteration"] for line in lines]
    assert all(line["ratio_max"] == pytest.approx(1.0, abs=1e-3) for line in lines)

    process.workers()[0].kill()
    status, output = process.finish(timeout=30)
    process.assert_nothing_left()
    assert status == 1 and "worker actor-0 died (SIGKILL: out of memory?)" in output, output
    assert "worker rollout-0 died (SIGKILL: out of memory?); starting it again in 1 s" in output
    assert "worker rollout-1 hangs: no sign of life for 12 s; starting it again in 1 s" in output
    assert_clean_end(tmp_path / "x", output)


def test_an_error_in_a_worker_ends_the_run_by_name(endless, tmp_path):
    process = endless("--lr 1e9 --warmup 0 --minibatch 2", wait=False)
    status, output = process.finish()
    process.assert_nothing_left()
    assert (
        status == 1
        and "worker actor-0 failed: FloatingPointError: the gradient of version" in output
    ), output
    assert "Traceback" in (tmp_path / "x" / "error.txt").read_text() and "error.txt" in output
    page = read_page(tmp_path / "x")
    assert page.all("p")[0]["class"] == "state failed"
    assert page.text.index("error: worker actor-0 failed") < page.text.index("Traceback")
    assert_clean_end(tmp_path / "x", output)


# ---------------------------------------------------------------- faults of simulators

FAULTY = (
    "--model emulated --env emulated --image-size 8 --envs 4 --env-workers 2 --batch 8 --minibatch "
    "8 --micro-batch 6 --segment 3 "
    "--update-epochs 1 --eval-envs 2 --eval-episodes 4 --eval-every 1 --ratio 2:1 --iterations 4"
)


@pytest.fixture
def faulty(cli, tmp_path):
    """Starts a small run on a simulator that fails: see `faulty.py`."""

    def start(fault: str, after: int, flags: str, **environment: str):
        environment |= {"FAULT": fault, "AFTER": str(after), "PYTHONPATH": str(ROOT)}
        return cli(
            Path(__file__).with_name("faulty.py"),
            f"{FAULTY} {flags} --run {tmp_path / 'x'}",
            **environment,
        )

    return start


def assert_exact(
    run: Path, iterations: int, restarts: int, trajectories: int = 8, segment: int = 3
) -> None:
    """Every chunk step that was collected was trained once or discarded, and no episode of an
    evaluation was lost or doubled."""
    lines = read_metrics(run)
    assert [line["iteration"] for line in lines] == list(range(1, iterations + 1))
    assert lines[-1]["restarts"] == restarts
    assert [line["trained_once"] for line in lines] == [
        trajectories * segment * line["iteration"] for line in lines
    ]
    assert assert_balanced(run)["discarded"] == lines[-1]["discarded_by"]["restart"]


FAULTS = [  # fault, control steps of the process before it, flags, what is said of it
    (
        "raise",
        100,
        "--preset full --actor-workers 2 --rollout-workers 2",
        "failed: RuntimeError: the simulator broke",
    ),
    ("segfault", 60, "--preset sync-colocated", "died (SIGSEGV)"),
    ("exit", 60, "--preset full", "died (exit code 0)"),
    ("hang", 80, "--preset sync-disaggregated --timeout-s 8", "hangs: no sign of life for 8 s"),
    (
        "nan",
        100,
        "--preset train-async",
        "failed: FloatingPointError: a state of task 'emulated' (lane ",
    ),
    (
        "reward",
        70,
        "--preset rollout-async",
        "failed: FloatingPointError: a reward of task 'emulated' (lane ",
    ),
    ("evaluation", 0, "--preset full --timeout-s 8", "hangs: no sign of life for 8 s"),
]


@pytest.mark.parametrize("fault, after, flags, words", FAULTS, ids=[fault for fault, *_ in FAULTS])
def test_a_simulator_s_fault_costs_its_worker_s_trajectories_and_no_more(
    faulty, tmp_path, fault, after, flags, words
):
    mark = tmp_path / "struck"
    process = faulty(fault, after, flags, MARK=str(mark))
    status, output = process.finish()
    process.assert_nothing_left()
    assert status == 0 and "4 iterations done" in output and mark.exists(), output
    (said,) = (line for line in output.splitlines() if line.startswith("worker "))
    assert (
        re.match(r"worker env-[01] ", said)
        and words in said
        and said.endswith("; starting it again in 1 s (1 of 5 in 60 min)")
    ), said
    assert_exact(tmp_path / "x", iterations=4, restarts=1)
    last = read_metrics(tmp_path / "x")[-1]
    assert (last["eval_version"], last["eval_episodes"]) == (4, 4)
    assert_clean_end(tmp_path / "x", output)


GRPO = "--algorithm grpo --group-size 2 --segment 8 --update-epochs 2 --eval-envs 0"
LANES = "--env vectorised --envs 8 --lanes 2"
LEDGERS = [  # flags, and the reasons for which chunk steps are discarded
    (f"{GRPO} --actor-workers 2", {"restart", "filtered"}),
    (f"{GRPO} {LANES} --max-staleness 0", {"restart", "filtered", "after_end"}),
    (f"{GRPO} --chunk-share 0.5", {"restart", "filtered", "undrawn"}),
    (f"{LANES} --segment 3 --update-epochs 3 --minibatch 4 --eval-envs 0", {"restart"}),
]


@pytest.mark.parametrize(
    "flags, reasons", LEDGERS, ids=["grpo", "grpo-vectorised", "grpo-share", "ppo-vectorised"]
)
def test_the_ledger_balances_to_the_step_though_a_worker_is_killed(
    faulty, tmp_path, flags, reasons
):
    status, output = faulty("kill", 100, flags, MARK=str(tmp_path / "struck"), WINS="").finish(
        timeout=240
    )
    assert status == 0 and "died (SIGKILL: out of memory?); starting it again" in output, output
    last = assert_balanced(tmp_path / "x")
    assert {reason for reason, steps in last["discarded_by"].items() if steps} == reasons
    assert last["trained_once"] > 0 and last["restarts"] == 1


def test_the_ledger_goes_on_when_a_run_is_resumed(faulty, cli, tmp_path):
    """Interrupted where fast envs are a batch ahead: what they had played is discarded, and played
    again."""
    process = faulty(
        "none",
        0,
        f"{GRPO} --max-staleness 3 --iterations 100000 --checkpoint-every 100000",
        WINS="",
    )
    process.wait_for(tmp_path / "x" / "metrics.jsonl", lines=2, timeout=240)
    process.interrupt_group()
    status, output = process.finish(timeout=240)
    assert status == 130 and "interrupted; saved" in output, output
    before = read_metrics(tmp_path / "x")[-1]
    left = before["collected"] - before["trained_once"] - before["discarded"]
    flags = f"--resume {tmp_path / 'x'} --iterations {before['iteration'] + 2}"
    environment = {"FAULT": "none", "AFTER": "0", "WINS": "", "PYTHONPATH": str(ROOT)}
    status, output = cli(Path(__file__).with_name("faulty.py"), flags, **environment).finish(
        timeout=240
    )
    assert status == 0, output
    last = assert_balanced(tmp_path / "x")
    assert (
        last["iteration"] == before["iteration"] + 2 and last["discarded_by"]["resume"] == left > 0
    )
    assert (
        last["trained_once"] > before["trained_once"]
        and last["discarded_by"]["filtered"] >= before["discarded_by"]["filtered"]
    )


@pytest.mark.parametrize(
    "fault, words",
    [
        (
            "raise",
            "RuntimeError: the simulator broke (details in {run}/error.txt), after 1 restarts in "
            "60 min: --restarts ",
        ),
        ("start", "RuntimeError: there is no simulator (details in {run}/error.txt)\n"),
    ],
)
def test_a_simulator_that_always_fails_ends_the_run(faulty, tmp_path, fault, words):
    status, output = faulty(fault, 20, "--env-workers 1 --restarts 1").finish()
    assert (
        status == 1 and "error: worker env-0 failed: " + words.format(run=tmp_path / "x") in output
    ), output


# ---------------------------------------------------------------- errors of wrong code

WRONG = ("SyntaxError", "NameError", "UnboundLocalError", "AttributeError", "TypeError", "KeyError")
WRONG += ("IndexError", "ImportError", "ValueError", "AssertionError", "NotImplementedError")
PASSING = ("FloatingPointError", "RuntimeError", "OSError", "MemoryError", "ZeroDivisionError")


def test_what_may_pass():
    for name in WRONG:
        assert not may_pass(getattr(builtins, name)("x")), name
    for name in PASSING:
        assert may_pass(getattr(builtins, name)("x")), name
    assert may_pass(np.linalg.LinAlgError("a singular matrix of a simulation"))
    assert may_pass(torch.OutOfMemoryError("a GPU is full"))
    assert not may_pass(UserError("a mistake"))


def step_once(meter: Meter) -> None:
    """What an env worker does, without the rest of a run."""
    import faulty

    meter.ready()
    env = faulty.Env(("emulated",), 8)
    env.reset(0, 0)
    env.step(np.zeros(4, np.float32))


@pytest.mark.parametrize("error", [*WRONG, *PASSING])
def test_an_error_is_tried_again_only_where_it_may_pass(monkeypatch, tmp_path, error):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    counters = Counters(1, columns(0))
    meter = Meter("env-0", 0, counters, None)
    environment = {"FAULT": error, "AFTER": "0"}
    job = Job("env-0", step_once, (meter,), 1, meter, environment, replaceable=True)
    crew = Crew([job], counters, tmp_path, restarts=1, timeout=60.0)
    news, _ = get_context("forkserver").Pipe(duplex=False)
    crew.start_all()
    with pytest.raises(WorkerFailed) as failed:
        while True:
            crew.watch(news)
    crew.stop(Interrupts())
    said = str(failed.value)
    tries = (tmp_path / "error.txt").read_text().count("Traceback")
    if error in PASSING:
        assert tries == 2 and "after 1 restarts" in said, said
    else:
        place = rf"at tests/faulty.py:\d+ \(details in {tmp_path}/error.txt\)"
        words = rf"worker env-0 failed: {error}: .*the simulator broke.*, {place}"
        assert tries == 1 and re.fullmatch(words, said), said


def test_an_actor_that_was_killed_is_named_rather_than_who_lost_it(tmp_path):
    """Out of memory on one rank ends the others with an error of what they meet by."""
    counters = Counters(2, columns(0))
    jobs = [
        Job(f"actor-{rank}", print, (), 1, Meter(f"actor-{rank}", rank, counters, None), {})
        for rank in range(2)
    ]
    crew = Crew(jobs, counters, tmp_path, 2, timeout=60.0)
    crew.processes = {"actor-0": SimpleNamespace(exitcode=None)}
    crew.errors, said = get_context("forkserver").Pipe(duplex=False)
    lost = Failure("actor-0", "RuntimeError: connection closed by peer", False)
    said.send((lost, ""))
    assert crew.failure() == lost
    said.send((lost, ""))
    crew.processes["actor-1"] = SimpleNamespace(exitcode=-signal.SIGKILL)
    assert crew.failure() == Failure("actor-1", "died (SIGKILL: out of memory?)", True)


def test_hundreds_of_workers_start_meet_and_end(cli):
    status, output = cli(Path(__file__).with_name("crowd.py"), "", PYTHONPATH=str(ROOT)).finish(
        timeout=120
    )
    assert status == 0 and f"{MOST_WORKERS} workers have met" in output, output


def test_who_is_out_of_gpu_memory_names_its_budget_and_the_flags(monkeypatch):
    properties = SimpleNamespace(total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    said = (
        "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 74.50 "
        "GiB of which 1.19 GiB is free. Including non-PyTorch memory, this has 18 GiB memory"
    )
    error = torch.OutOfMemoryError(said)
    part = processes.GpuPart("cuda:3", 0.25)
    assert processes.describe(error, part) == (
        "failed: out of GPU memory: its budget is 20.0 of 80.0 GB of cuda:3, it asked for 2.50 GiB "
        f"more, and 1.19 GiB are free there: {processes.LESS_MEMORY}"
    )
    assert "80.0 GB of cuda:3: lower" in processes.describe(torch.OutOfMemoryError("?"), part)
    assert said in processes.describe(error)  # a simulator's, which has no budget
    for flag in re.findall(r"--[a-z-]+", processes.LESS_MEMORY):
        assert flag[2:].replace("-", "_") in STAGE_OF


def say_its_cores(meter) -> None:
    raise UserError(f"on {sorted(os.sched_getaffinity(0))} with {torch.get_num_threads()} threads")


def test_a_worker_has_the_cores_and_threads_of_its_job(tmp_path):
    counters = Counters(1, columns(0))
    meter = Meter("env-0", 0, counters, None)
    core = min(os.sched_getaffinity(0))
    job = Job("env-0", say_its_cores, (meter,), 3, meter, {}, cores=frozenset({core}))
    crew = Crew([job], counters, tmp_path, restarts=0, timeout=60.0)
    news, _end = get_context("forkserver").Pipe(duplex=False)
    try:
        crew.start_all()
        with pytest.raises(WorkerFailed, match=rf"on \[{core}\] with 3 threads"):
            while True:
                crew.watch(news)
    finally:
        crew.stop(Interrupts())


class Told(Meter):
    """Is told to leave just when it writes its last spans."""

    def flush(self) -> None:
        os.kill(os.getpid(), processes.LEAVE)
        super().flush()


def act_once(leaves: bool, meter: Meter) -> None:
    with meter.work("infer"):
        pass
    if leaves:
        os.kill(os.getpid(), processes.LEAVE)


@pytest.mark.parametrize("leaves", [False, True], ids=["ends by itself", "is told twice"])
def test_a_worker_writes_its_last_spans_whenever_it_is_told_to_leave(tmp_path, leaves):
    counters = Counters(1, columns(0))
    meter = Told("env-0", 0, counters, tmp_path)
    crew = Crew(
        [Job("env-0", act_once, (leaves, meter), 1, meter, {})], counters, tmp_path, 0, 60.0
    )
    crew.start_all()
    crew.processes["env-0"].join(60.0)
    crew.stop(Interrupts())
    (span,) = json.loads((tmp_path / "env-0.jsonl").read_text())
    assert span[0] == "infer"


def fail_at_start(meter) -> None:
    if not meter.restarts():
        meter.ready()
    raise RuntimeError("nothing to draw with")


def test_an_error_that_comes_again_at_start_does_not_pass(tmp_path):
    counters = Counters(1, columns(0))
    meter = Meter("env-0", 0, counters, None)
    job = Job("env-0", fail_at_start, (meter,), 1, meter, {}, replaceable=True)
    crew = Crew([job], counters, tmp_path, restarts=5, timeout=60.0)
    news, _ = get_context("forkserver").Pipe(duplex=False)
    crew.start_all()
    twice = "nothing to draw with .* twice in a row before it had done anything"
    with pytest.raises(WorkerFailed, match=twice):
        while True:
            crew.watch(news)
    crew.stop(Interrupts())
    assert counters.get(0, "restarts") == 1


def test_an_error_passes_as_long_as_work_is_done_between(monkeypatch, tmp_path):
    """A GPU's memory may be short in one inference and not in the next thousand."""
    counters = Counters(1, columns(0))
    clock = [1e6]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    meter = Meter("rollout-0", 0, counters, None)
    job = Job("rollout-0", print, (), 1, meter, {}, replaceable=True)
    crew = Crew([job], counters, tmp_path, restarts=9, timeout=60.0)
    crew.processes["rollout-0"] = Gone()
    full = Failure("rollout-0", "failed: out of GPU memory", True)
    for _ in range(3):
        meter.ready()
        with meter.work("infer"):
            clock[0] += 0.1
        crew.replace(full)
    meter.ready()
    crew.replace(Failure("rollout-0", "died (SIGKILL)", True))
    crew.replace(full)  # the first time that it comes at once
    with pytest.raises(WorkerFailed, match="twice in a row before it had done anything"):
        crew.replace(full)


def test_a_successor_that_reads_weights_and_compiles_has_the_time_for_it(monkeypatch, tmp_path):
    counters = Counters(2, columns(0))
    clock = [1e6]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    jobs = []
    for row, (name, start_up) in enumerate({"env-0": 1, "rollout-0": START_UP}.items()):
        meter = Meter(name, row, counters, None)
        jobs.append(Job(name, print, (), 1, meter, {}, True, start_up))
        counters.set(row, "restarts", 1)
    crew = Crew(jobs, counters, tmp_path, 2, timeout=60.0)
    crew.started = dict.fromkeys(crew.jobs, clock[0])
    clock[0] += 59.0
    counters.set(0, "time", clock[0])  # it has made one of its simulators
    clock[0] += 2.0
    assert not crew.hangs("env-0")
    clock[0] += 59.0
    assert crew.hangs("env-0") and not crew.hangs("rollout-0")
    crew.check_progress()  # who waits for it meanwhile does not hang
    clock[0] += 490.0
    assert crew.hangs("rollout-0") and crew.limit("rollout-0") == 600.0
    # Even if each start takes so long, too many of them are seen as such.
    crew.processes["rollout-0"] = Gone()
    hangs = Failure("rollout-0", "hangs", True)
    for _ in range(2):
        crew.replace(hangs)
        clock[0] += 661.0
    with pytest.raises(WorkerFailed, match="after 2 restarts"):
        crew.replace(hangs)
    # At work it is as any other.
    counters.set(1, "ready", 1)
    assert crew.limit("rollout-0") == 60.0


def test_an_error_in_a_simulator_s_code_ends_the_run_at_once(faulty, tmp_path):
    status, output = faulty("KeyError", 20, "").finish()
    assert status == 1 and "starting it again" not in output, output
    words = r"error: worker env-\d failed: KeyError: 'the simulator broke', at tests/faulty.py:\d+ "
    assert re.search(words, output.splitlines()[-1]), output


class Gone:
    """In place of a process that has died."""

    kill = join = is_alive = lambda *_: False


def test_faults_of_long_ago_do_not_count(monkeypatch, tmp_path, capsys):
    counters = Counters(1, columns(0))
    clock = [1e6]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    job = Job("env-0", print, (), 1, Meter("env-0", 0, counters, None), {}, replaceable=True)
    crew = Crew([job], counters, tmp_path, restarts=2, timeout=60.0)
    crew.processes["env-0"] = Gone()
    counters.set(0, "ready", 1)
    for later in (0.0, 100.0, 3550.0, 3500.0):  # never more than two within an hour
        clock[0] += later
        crew.replace(Failure("env-0", "died", True))
    said = [line.split("again ")[1] for line in capsys.readouterr().out.splitlines()]
    assert said == [f"in {n} s ({n} of 2 in 60 min)" for n in (1, 2, 2, 2)]
    assert (
        counters.get(0, "restarts") == 4
    )  # the number of its generation, and what the run reports
    with pytest.raises(
        WorkerFailed, match="env-0 died, after 2 restarts in 60 min: --restarts allows no more"
    ):
        crew.replace(Failure("env-0", "died", True))


def test_a_launcher_that_was_away_starts_its_clocks_again(monkeypatch, tmp_path):
    """Ctrl-Z, docker pause, a cluster's suspend: all processes were away for ten minutes."""
    counters = Counters(1, columns(0))
    clock = [1e6]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    meter = Meter("env-0", 0, counters, None)
    crew = Crew([Job("env-0", print, (), 1, meter, {})], counters, tmp_path, 2, timeout=60.0)
    crew.started = {"env-0": clock[0]}
    meter.ready()
    for away in (0.25, 600.0):
        clock[0] += away
        crew.notice_absence()
        crew.check_progress()
        assert not crew.hangs("env-0")
    for _ in range(241):  # from here on a minute of silence counts
        assert not crew.hangs("env-0")
        clock[0] += 0.25
        crew.notice_absence()
    assert crew.hangs("env-0")
    with pytest.raises(WorkerFailed, match="nothing happened for 60 s: env-0"):
        crew.check_progress()


@pytest.mark.parametrize(
    "dies_at, silent_from, ctrl_c, ends_at, killed",
    [
        (3, 1e9, 0, 3, False),
        (1e9, 1e9, 2, 5, True),  # it is not waited for
        (200, 1e9, 1, 200, False),
        (1e9, 20, 0, 85, True),  # its last sign of life, --timeout-s, 5 s
    ],
)
def test_who_writes_a_checkpoint_has_the_time_for_it(
    monkeypatch, tmp_path, capsys, dies_at, silent_from, ctrl_c, ends_at, killed
):
    counters = Counters(1, columns(0))
    clock = [1000.0]
    kills = []

    class Process:
        pid = sentinel = 7

        def is_alive(self):
            return clock[0] < 1000.0 + dies_at

        def join(self, seconds=0.0):
            clock[0] += min(seconds, max(0.0, 1000.0 + dies_at - clock[0]))

    def sleep(seconds):
        clock[0] += seconds
        counters.set(0, "time", min(clock[0], 1000.0 + silent_from))

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(processes.os, "kill", lambda *kill: kills.append(kill))
    monkeypatch.setattr(processes, "lives", lambda pid: False)  # a killed one is gone at once
    meter = Meter("actor-0", 0, counters, None)
    crew = Crew([Job("actor-0", print, (), 1, meter, {})], counters, tmp_path, 2, timeout=60.0)
    crew.processes["actor-0"] = Process()
    meter.ready()
    meter.set("saving", 1)
    crew.stop(Interrupts([signal.SIGINT] * ctrl_c))
    assert clock[0] == pytest.approx(1000.0 + ends_at, abs=1.0)
    assert kills[0] == (7, processes.LEAVE) and len(kills) == 1 + killed
    assert "a checkpoint is being written; Ctrl-C twice" in capsys.readouterr().out


def test_a_suspended_run_goes_on(cli, tmp_path):
    run = tmp_path / "x"
    flags = "--actor-workers 2 --micro-batch 2 --timeout-s 2 --checkpoint-every 1000000"
    process = cli("train.py", f"{QUICK} {flags} --run {run}")
    process.wait_for(run / "metrics.jsonl", 20)
    os.killpg(process.process.pid, signal.SIGSTOP)
    time.sleep(6.0)
    before = len(read_metrics(run))
    os.killpg(process.process.pid, signal.SIGCONT)
    process.wait_for(run / "metrics.jsonl", before + 20)
    process.interrupt_group()
    status, output = process.finish(timeout=30)
    assert status == 130 and "interrupted; saved" in output and "hangs" not in output, output


def test_whoever_loses_its_launcher_says_nothing(cli, tmp_path):
    """Its actor may be about to report just then."""
    process = cli("train.py", f"{QUICK} --run {tmp_path / 'x'}")
    process.wait_for(tmp_path / "x" / "metrics.jsonl", 20)
    process.process.kill()
    _, output = process.finish(timeout=30)
    process.assert_nothing_left()
    assert "Traceback" not in output and "BrokenPipe" not in output, output


def test_a_worker_may_be_replaced_any_number_of_times(tmp_path, capsys):
    counters = Counters(1, columns(0))
    job = Job("env-0", print, (), 1, Meter("env-0", 0, counters, None), {}, replaceable=True)
    crew = Crew([job], counters, tmp_path, restarts=10_000, timeout=60.0)
    crew.processes["env-0"] = Gone()
    counters.set(0, "ready", 1)
    crew.lost["env-0"] = [time.monotonic()] * 2000
    crew.replace(Failure("env-0", "died", True))
    assert "starting it again in 60 s (2001 of 10000 in" in capsys.readouterr().out


def test_killed_simulators_are_replaced_and_ctrl_c_ends_a_run_without_them(endless, tmp_path):
    """Meta-World, killed as for want of memory; the second time while the first is being replaced,
    the third for good."""
    process = endless("--restarts 2 --actor-workers 2")
    before = process.workers()
    for worker in before[3:]:  # env-0 and env-1, after two actor workers and a rollout worker
        worker.kill()
    wait_until(lambda: len(process.workers()) == 5)
    count = len(read_metrics(tmp_path / "x"))
    process.wait_for(tmp_path / "x" / "metrics.jsonl", lines=count + 2)
    assert read_metrics(tmp_path / "x")[-1]["restarts"] == 2
    process.workers()[3].kill()
    wait_until(lambda: len(process.workers()) == 4)  # its successor is due in two seconds
    process.interrupt_group()
    status, output = process.finish(timeout=30)
    process.assert_nothing_left()
    assert (
        status == 130 and output.count("died (SIGKILL: out of memory?); starting it again in") == 3
    ), output
    assert_clean_end(tmp_path / "x", output)


def wait_until(condition, timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---------------------------------------------------------------- what is handed to processes


def poke(pool, counters, queues) -> None:
    counters.add(0, "a", len(queues))


def test_pools_and_queues_sent_to_processes_leave_no_file_open():
    def once() -> None:
        pool = SlotPool(SPEC, 2)
        counters = Counters(1, ("a",))
        queues = tuple(IndexQueue() for _ in range(3))
        process = get_context("forkserver").Process(target=poke, args=(pool, counters, queues))
        process.start()
        process.join(60)
        assert process.exitcode == 0
        process.close()

    once()
    before = open_files()
    once()
    assert open_files() == before
