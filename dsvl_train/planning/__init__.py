"""What a run will need on each rank, from its configuration alone: no process group, no weights, no megatron-core."""
