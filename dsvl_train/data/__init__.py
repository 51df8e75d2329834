"""The data pipeline: from conversations and images in shards to the tensors of a training step."""
