"""Checkpoints as folders of files: what makes one whole, how it becomes visible, which ones go. Knows no tensors and needs no torch.

    checkpoints/step_00000012/   shard_….safetensors  state.json  config.yaml  processor/  manifest.json
    checkpoints/latest           a text file: the name of the newest one

`manifest.py` says what a whole folder holds and finds damage, `folders.py` finds checkpoints, `publication.py` makes them visible and
clears what killed runs left, `retention.py` decides which ones are kept.
"""
