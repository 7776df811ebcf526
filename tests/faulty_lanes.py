"""The simulator of `faulty.py` as a vectorised one."""

import faulty
from faulty import spec
from stacked import Stacked

__all__ = ["Envs", "spec"]


class Envs(Stacked):
    kind = faulty.Env
