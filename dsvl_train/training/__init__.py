"""Training: the loop that runs every stage, its step, optimiser groups, schedules, freeze policy, checkpoints and callbacks."""
