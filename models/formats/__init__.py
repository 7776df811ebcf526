"""Other projects' files: how their checkpoints name weights, what their statistics mean, how they
word prompts, resize pictures and number actions. One file per family, and what several share.
"""
