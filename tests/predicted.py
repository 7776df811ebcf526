"""A small node whose speed tests predict: eight lanes, and one worker of each other stage."""

from planning import Node

NODE = Node(
    lanes=8,
    env_devices=("cpu",) * 4,
    rollout_devices=("cpu",),
    actor_devices=("cpu",),
    segment=8,
    chunk=10,
    batch=16,
    minibatch=8,
    micro_batch=2,
    update_epochs=1,
    max_staleness=1,
    batch_max="auto",
    batch_wait_s="auto",
    stream=True,
)
