"""memory.py: what it counts against sums made by hand, and against what processes really use."""

import contextlib
import json
import re
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT, Cli
from torch import nn

import allocations
import memory
import prepare
import train
from allocations import Sketch
from config import completed
from errors import UserError
from memory import GB, USABLE, MemoryConfig, Room, Table

LARGE = Room(0, 0.0, 1e12, 2)
ROWS = 12


class Chain(nn.Module):
    """Three layers without bias, behind what memory.py asks of a model."""

    def __init__(self, width: int = 64, depth: int = 3):
        super().__init__()
        self.width = width
        with torch.device("meta"):
            self.blocks = nn.ModuleList(nn.Linear(width, width, False) for _ in range(depth))

    config = type("Shape", (), {"played": (1, 1)})
    idle = tuple

    def acts_in(self, name):
        return None

    def observation_fields(self):
        return {"x": ((self.width,), torch.float32)}

    def slot_fields(self):
        return {}

    def training_fields(self):
        return ("x",)

    def trainable(self):
        return dict(self.named_parameters())

    def draw(self, keys, explore):
        return {"noise": torch.zeros(len(keys), self.width)}

    def act(self, observed, noise):
        with torch.no_grad():
            x = observed["x"] + noise["noise"]
            for block in self.blocks:
                x = block(x)
        return {"actions": x}

    def evaluate(self, batch):
        x = batch["x"]
        for block in self.blocks:
            x = block(x)
        return {"logprob": x, "value": batch["x"][:, 0]}


def test_a_chain_takes_what_its_layers_sizes_say():
    chain = Chain()
    row = 4 * chain.width
    activation = ROWS * row
    weight = 4 * chain.width**2
    # Observations, noise, and of the layers one's input and its output.
    assert allocations.inference_peak(Sketch.of(chain), ROWS) == 4 * activation
    # In backward: what was copied, what is trained on of it and what was left over, with actions,
    # every layer's output, the gradient of one layer's input and weights; four sums and their
    # gradients.
    depth = len(chain.blocks)
    expected = 20 * row + (20 + ROWS) * (row + 4) + (depth + 1) * activation + weight
    found = allocations.training_peak(Sketch.of(chain), ROWS, 20, False, False)
    assert expected <= found <= expected + 8 * 4
    # With checkpointing each layer's input is all that is kept, which here is every output.
    again = allocations.training_peak(Sketch.of(chain), ROWS, 20, True, False)
    assert abs(again - found) <= 2 * activation
    deep = Chain(depth=30)
    more = allocations.training_peak(Sketch.of(deep), ROWS, 20, False, False) - found
    assert more == 27 * activation


def test_adamw_takes_what_is_said():
    trained = Chain().trainable()
    weights = list(trained.values())
    for parameter in weights:
        parameter.grad = torch.empty_like(parameter)
    account = allocations.Account([*weights, *(p.grad for p in weights)])
    optimizer = torch.optim.AdamW(weights, foreach=False)
    with account:
        optimizer.step()
    kept, step = allocations.optimizer_bytes(trained, fused=False)
    assert (account.now, account.peak - account.now) == (kept, step)
    # The fused one, which has no kernel for tensors without memory, steps in place.
    assert allocations.optimizer_bytes(trained, fused=True) == (kept, 0)


def test_attention_keeps_no_square_of_the_length():
    def peak(length: int) -> int:
        account = allocations.Account()
        with account:
            q = torch.empty(1, 2, length, 8, device="meta", requires_grad=True)
            allocations.attention(q, q[:, :1], q[:, :1]).sum().backward()
        return account.peak

    assert peak(2000) - peak(1000) == peak(3000) - peak(2000)


def laid_out(room: Room, *flags: str):
    return prepare.demand_of(train.parse(list(flags)), room)


def test_the_embedded_default_stays_as_it_is_on_a_cpu():
    begun = time.process_time()
    demand, _ = laid_out(Room(0, 0.0, 24e9, 2))
    assert time.process_time() - begun < 2.0  # it needs no look at the model's functions
    actor = demand.config.actor
    assert actor.micro_batch == 2 * demand.config.env.segment
    assert (actor.checkpointing, actor.cache_prefix) == ("off", "slots")


def actors_need(demand, **changes) -> float:
    """Bytes of the first GPU on which an actor is, with other settings."""
    changed = replace(demand, config=completed(demand.config, **changes))
    sums = Table(changed, LARGE).sums()
    return max(row.total for row in sums if row.device == demand.placement.actor_devices[0])


def test_the_largest_micro_batch_that_fits_is_chosen():
    small = Room(2, 1e12, 1e12, 2)
    demand, _ = laid_out(small, "--ratio", "1:1", "--model", "oft")
    assert demand.config.actor.micro_batch == memory.LARGEST
    assert demand.config.actor.checkpointing == "off"
    for size, way in ((64, "off"), (16, "off"), (32, "on")):
        needs = actors_need(demand, micro_batch=size, checkpointing=way)
        if way == "on":  # less than 16 chunk steps would fit without checkpointing
            assert needs < actors_need(demand, micro_batch=16)
        room = small._replace(gpu=(needs + 1) / USABLE)
        found = laid_out(room, "--ratio", "1:1", "--model", "oft")[0].config.actor
        assert (found.micro_batch, found.checkpointing) == (size, way)
        given = ("--ratio", "1:1", "--model", "oft", "--micro-batch", "8")
        assert laid_out(room, *given)[0].config.actor.micro_batch == 8


def test_a_prefix_is_kept_where_there_is_room():
    """In slots of at most half of the host's memory, else on the device for several epochs."""
    room = Room(2, 1e12, 1e12, 2)
    demand, _ = laid_out(room, "--ratio", "1:1")
    half = room._replace(host=2 * demand.pool_bytes)
    assert laid_out(half, "--ratio", "1:1")[0].config.actor.cache_prefix == "slots"
    less = half._replace(host=half.host - 2)
    kept, _ = laid_out(less, "--ratio", "1:1")
    assert kept.config.actor.cache_prefix == "gpu"
    actor = next(
        row
        for row in Table(kept, less, 0.0).rows.values()
        if row.slots and row.process == "actor-0"
    )
    shape, dtype = demand.slots["prefix_cache"]
    assert actor.slots > 48 * torch.Size(shape).numel() * dtype.itemsize
    once = laid_out(less, "--ratio", "1:1", "--update-epochs", "1")[0]
    assert once.config.actor.cache_prefix == "off"


def test_what_does_not_fit_is_refused_with_flags_that_make_it_fit():
    room = Room(2, 1e12, 1e12, 2)
    flags = ("--ratio", "1:1", "--model", "oft", "--micro-batch", "128", "--checkpointing", "off")
    flags += ("--precision", "float32")
    demand, lay_out = laid_out(room, *flags)
    memory.check(demand, room, lay_out)
    small = room._replace(gpu=actors_need(demand, micro_batch=64) / USABLE + 1)
    with pytest.raises(UserError, match="cuda:1 needs .* and has .* GB: give (--.*)") as refusal:
        memory.check(demand, small, lay_out)
    advised = str(refusal.value).partition("give ")[2].split()
    memory.check(laid_out(small, *flags, *advised)[0], small, lay_out)
    processes = 1.01e9 / USABLE  # two take 1.0 GB of the first GPU without a model
    for size, words in ((processes, "larger or more GPUs, fewer"), (1e6, "it takes a larger GPU")):
        with pytest.raises(UserError, match=words) as refusal:
            memory.check(demand, room._replace(gpu=size), lay_out)
        assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match="give its number of --gpus, too"):
        MemoryConfig(gpu_gb=24.0).room()


def test_a_gpu_too_small_for_cuda_graphs_of_inference_does_without():
    flags = ("--ratio", "1:1")
    large = Room(2, 1e12, 1e12, 2)
    eager = Table(laid_out(large, *flags, "--compile", "False")[0], large)
    needs = max(row.total for row in eager.sums() if row.device != "host")
    small = large._replace(gpu=(needs + 1) / USABLE)
    demand, lay_out = laid_out(small, *flags)
    with pytest.raises(UserError, match=r"cuda:0 needs .* and has .* GB: give .*--compile False$"):
        memory.check(demand, small, lay_out)
    memory.check(laid_out(small, *flags, "--compile", "False")[0], small, lay_out)


def test_the_command_prints_and_writes_every_row(tmp_path, capsys):
    file = tmp_path / "rows.json"
    flags = ["--ratio", "1:1", "--envs", "6", "--batch", "6", "--minibatch", "6"]
    memory.main(MemoryConfig(gpus=2, gpu_gb=24.0, host_gb=64.0, json=file), flags)
    printed = capsys.readouterr().out
    written = json.loads(file.read_text())
    assert written["what"] == "memory"
    sizes = [f"{part}_gb" for part in (*memory.PARTS, "total")]
    for row in written["rows"]:
        assert list(row) == ["process", "device", *sizes, "fits"]
        assert row["total_gb"] == pytest.approx(sum(row[f"{part}_gb"] for part in memory.PARTS))
        assert row["fits"]
    found = {(row["process"], row["device"]) for row in written["rows"]}
    wanted = {("shared", "host"), ("actor-0", "cuda:1"), ("rollout-0", "cuda:0"), ("all", "host")}
    assert wanted <= found and "of 64.0" in printed
    with pytest.raises(UserError, match="--gpu-gb 0"):
        memory.main(MemoryConfig(gpus=2, gpu_gb=0.0), [])


def test_ranks_that_share_the_weights_divide_them():
    """Parameters, gradients and optimizer; whole are only two blocks and what is in none."""
    room = Room(4, 1e12, 1e12, 4)
    flags = ("--ratio", "1:1", "--model", "oft", "--oft-train", "full", "--micro-batch", "8")
    alike, _ = laid_out(room, *flags)
    shared, _ = laid_out(room, *flags, "--shard")
    one, part = (Table(demand, room).rows["actor-1", "cuda:3"] for demand in (alike, shared))
    assert (part.gradients, part.optimizer) == (one.gradients / 2, one.optimizer / 2)
    blocks = [
        sum(p.nbytes for p in block.parameters())
        for blocks in shared.model.modules()
        for block in (blocks if isinstance(blocks, nn.ModuleList) else ())
    ]
    outside = one.weights - sum(blocks)
    assert part.weights == one.weights / 2 + outside + sum(sorted(blocks)[-2:])
    rows = Table(shared, room).rows
    assert rows["shared", "host"].weight_plane and ("shared", "cuda:2") not in rows


def shared_out(gpus: int, *flags: str) -> tuple[Table, Room]:
    room = Room(gpus, 80e9, 1e12, 16)
    demand, _ = laid_out(room, *flags)
    return memory.table_of(demand, room), room


PLACES = [  # GPUs, flags, and where the weight plane lies
    (1, "--placement colocated", "cuda:0"),
    (1, "--placement colocated --actor-workers 1 --rollout-workers 2 --env-workers 4", "cuda:0"),
    (2, "--placement colocated", "cpu"),
    (8, "--placement colocated --envs 32 --batch 64 --minibatch 64", "cpu"),
    (2, "--ratio 1:1", "cpu"),
    (4, "--ratio 3:1", "cpu"),
    (0, "--ratio 1:1", "cpu"),
]


@pytest.mark.parametrize("gpus, flags, plane", PLACES)
def test_a_process_has_a_context_only_where_its_own_work_is(gpus, flags, plane):
    table, _ = shared_out(gpus, *flags.split())
    demand = table.demand
    assert demand.plane_device == plane
    placed = {
        f"{stage}-{rank}": memory.place_of(device)
        for stage in ("env", "rollout", "actor")
        for rank, device in enumerate(getattr(demand.placement, f"{stage}_devices"))
    }
    placed["launcher"] = memory.place_of(plane)
    for name, device in table.rows:
        assert device in ("host", placed.get(name, device)), name
    plane_row = table.rows["shared", memory.place_of(plane)]
    assert plane_row.weight_plane == 2 * table.plane
    shard = replace(demand.config.actor, shard=True)
    assert replace(demand, config=replace(demand.config, actor=shard)).plane_device == "cpu"


def test_slots_on_a_gpu_are_opened_by_every_worker():
    flags = "--ratio 3:1 --placement hybrid --env vectorised --model emulated --tasks 0"
    room = Room(4, 80e9, 1e12, 16)
    demand, _ = laid_out(room, *flags.split())
    assert demand.on_gpu and demand.drawn_on == "cuda:0"
    rows = Table(demand, room).rows
    assert rows["launcher", "cuda:0"].total == memory.CONTEXT["launcher"]
    for name in ("rollout-0", "rollout-1", "actor-0"):
        assert rows[name, "cuda:0"].total == memory.CONTEXT[name[:-2]]
    assert memory.budgets(Table(demand, room), room) == {}  # nobody allocates where another does


@pytest.mark.parametrize("gpus, flags, plane", PLACES)
def test_who_shares_a_gpu_has_a_budget_that_leaves_the_simulators_theirs(gpus, flags, plane):
    table, room = shared_out(gpus, *flags.split())
    budgets = memory.budgets(table, room)
    said = memory.pools(table, room)
    placement = table.demand.placement
    for device in {row.device for row in table.sums()} - {"host"}:
        users = [d for d in placement.rollout_devices + placement.actor_devices if d == device]
        mine = budgets.get(device, {})
        assert len(mine) == (
            len(users) if len(users) + (device in placement.env_devices) > 1 else 0
        )
        if not mine:
            continue
        # Everybody has more than it needs, and all of it together is what the device has.
        rows = [row for (_, where), row in table.rows.items() if where == device]
        others = sum(row.total for row in rows if row.process not in (*mine, "all"))
        contexts = sum(row.other for row in rows if row.process in mine)
        needs = [(row.process, row.total - row.other) for row in rows if row.process in mine]
        assert all(mine[name] > need / USABLE for name, need in needs)  # it may lie in fragments
        fragments = sum(need / USABLE - need for _, need in needs)
        whole = sum(mine.values()) + contexts + others
        assert whole == pytest.approx(USABLE * room.gpu + fragments) and whole < room.gpu
        assert device in said and "\n" not in said
    assert bool(said) == bool(budgets)


def test_a_vectorised_simulator_has_half_of_what_is_left():
    flags = "--placement colocated --model oft --env {} --tasks 0 --envs 4 --batch 4 --minibatch 4"
    left = {}
    for env in ("emulated", "vectorised"):
        table, room = shared_out(1, *flags.format(env).split())
        free = room.on("cuda:0") - next(r.total for r in table.sums() if r.device == "cuda:0")
        ours = memory.budgets(table, room)["cuda:0"]
        needs = [row for (name, at), row in table.rows.items() if name in ours and at == "cuda:0"]
        left[env] = (
            sum(ours.values()) - sum(row.total - row.other for row in needs) / USABLE
        ) / free
        found = re.fullmatch(
            r"GPU memory, GB: cuda:0: rollout ([\d.]+), actor ([\d.]+), "
            r"left to simulators ([\d.]+)",
            memory.pools(table, room),
        )
        assert sum(map(float, found.groups())) == pytest.approx(80 - 1.9, abs=0.2)  # contexts
    assert left == pytest.approx({"emulated": 1.0, "vectorised": 0.5})


REACH = {  # flags, and the GB of each actor's GPU that they are to stay below
    "--recipe libero_10_grpo_openvlaoft --oft-train lora --lora-rank 32 --micro-batch 16": 30,
    "--recipe libero_10_ppo_gr00t --micro-batch 96 --cache-prefix off": 35,
    "--recipe libero_10_ppo_openpi_pi05 --train-vlm --prefix-dtype float32 --micro-batch 64 "
    "--shard --ratio 1:1": 60,
}


@pytest.mark.slow
@pytest.mark.parametrize("flags", REACH)
def test_checkpointing_brings_published_models_within_reach(flags):
    room = MemoryConfig(gpus=8).room()
    sizes = {}
    for way in ("on", "off"):
        demand, _ = laid_out(room, *flags.split(), "--checkpointing", way)
        sizes[way] = (
            Table(demand, room).rows["actor-0", demand.placement.actor_devices[0]].total / GB
        )
    assert sizes["on"] < REACH[flags] < sizes["off"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        "libero_10_ppo_openpi_pi05",
        "libero_10_ppo_gr00t",
        "libero_10_grpo_openvlaoft",
        "maniskill_ppo_openvlaoft",  # whose assets are not here
        "robocasa_closedrawer_ppo_openpi",  # whose simulator is not here
    ],
)
def test_a_published_model_is_laid_out_within_a_minute(recipe):
    begun = time.process_time()
    room = MemoryConfig(gpus=8).room()
    demand, lay_out = laid_out(room, "--recipe", recipe)
    try:
        memory.check(demand, room, lay_out)
    except UserError as refusal:
        assert "\n" not in str(refusal)
    assert time.process_time() - begun < 60.0
    whole = sum(p.numel() for p in demand.model.parameters())
    rollout = Table(demand, room, 0.0).rows["rollout-0", "cuda:0"]
    assert 2 * whole <= rollout.weights <= 4 * whole


def used(pid: int) -> int:
    """Bytes of a process and its descendants; what several share counts once."""
    found = 0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with contextlib.suppress(OSError, psutil.NoSuchProcess):
            text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            found += 1024 * int(re.search(r"^Pss: +(\d+)", text, re.MULTILINE)[1])
    return found


@pytest.mark.slow
def test_the_embedded_default_uses_what_is_said(tmp_path):
    demand, _ = laid_out(LARGE)
    said = next(row for row in Table(demand, LARGE).sums())
    run = Cli(ROOT / "train.py", f"--iterations 2 --run {tmp_path / 'x'}")
    most = 0
    while run.process.poll() is None:
        most = max(most, used(run.process.pid))
        time.sleep(0.5)
    assert run.finish()[0] == 0
    assert said.total == pytest.approx(most, rel=0.15), (said.total / GB, most / GB)
