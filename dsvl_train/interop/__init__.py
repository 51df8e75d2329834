"""Reading and writing models: our own checkpoints, and the formats of others."""
