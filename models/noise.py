"""Random numbers that have names."""

import numpy as np

Key = tuple[int, int, int, int]  # seed, env (of all nodes), trajectory, chunk step


def generator(key: Key) -> np.random.Generator:
    """Makes the random numbers of one inference, named by its key and by nothing else.

    Which requests share a batch is a matter of timing; the noise each one gets must not be."""
    seed, env, trajectory, t = key
    return np.random.Generator(
        np.random.Philox(key=[seed, env << 32 | trajectory], counter=[0, 0, 0, t])
    )
