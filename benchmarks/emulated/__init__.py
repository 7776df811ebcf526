"""Simulators and a policy that only take time, as long as RL-VLA³'s stages took, to measure the
pipeline between them: `train.py --model emulated --env emulated`.

    libero.py      --env emulated        LIBERO + π0.5
    gr00t.py       --env emulated_gr00t  LIBERO + GR00T N1.5
    maniskill.py   --env vectorised      ManiSkill + π0
    metaworld.py   --env emulated_metaworld  Meta-World + π0.5, colocated (second version)
    maniskill_hybrid.py  --env vectorised_hybrid  ManiSkill, hybrid 6:2 (second version)
    policy.py      --model emulated      inference and training, for all of them
    devices.py                           what stages share that have a GPU together
    helping.py                           actors that infer while they wait: an experiment
"""
