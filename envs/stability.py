"""MuJoCo's own word that a simulation has blown up, where it would begin anew and go on, or play 0
in place of a control that is not a number."""

import mujoco
from mujoco import mjtWarning

BLOWN_UP = (mjtWarning.mjWARN_BADQPOS, mjtWarning.mjWARN_BADQVEL, mjtWarning.mjWARN_BADQACC)
BLOWN_UP += (mjtWarning.mjWARN_BADCTRL,)


def be_silent(message: str) -> None:
    """Takes MuJoCo's warnings, which it would write to MUJOCO_LOG.TXT in the user's folder."""


mujoco.set_mju_user_warning(be_silent)  # `check` says it aloud


def check(data: mujoco.MjData) -> None:
    """Raises FloatingPointError where positions, speeds, accelerations or controls are absurd."""
    for kind in BLOWN_UP:
        if data.warning[int(kind)].number:
            raise FloatingPointError(
                f"the simulation became unstable ({kind.name}) at {data.time:.2f} s"
            )
