"""MuJoCo's own word that a simulation has blown up. It would put everything back to where the model
begins, and go on.
"""

import mujoco

BLOWN_UP = tuple(
    int(kind)
    for kind in (
        mujoco.mjtWarning.mjWARN_BADQPOS,
        mujoco.mjtWarning.mjWARN_BADQVEL,
        mujoco.mjtWarning.mjWARN_BADQACC,
    )
)

mujoco.set_mju_user_warning(
    lambda _: None
)  # it would write MUJOCO_LOG.TXT into the user's folder; `check` says it aloud


def check(data: mujoco.MjData) -> None:
    """Raises FloatingPointError if positions, speeds or accelerations have become infinite or
    absurd since the last reset.
    """
    for kind in BLOWN_UP:
        if data.warning[kind].number:
            raise FloatingPointError(
                f"the simulation became unstable ({mujoco.mjtWarning(kind).name}) at "
                f"{data.time:.2f} s"
            )
