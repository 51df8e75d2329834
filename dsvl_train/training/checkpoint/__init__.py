"""A run's checkpoints: what they hold (`state.py`), copied to host memory (`snapshot.py`), written behind the training (`saver.py`), chosen
and verified when a run goes on (`resume.py`).

The format is `interop.native`'s, the optimiser's tensors lie beside the model's. As folders of files they are `dsvl_train.checkpoints`'.
"""

from dsvl_train.training.checkpoint.resume import prepare_resume
from dsvl_train.training.checkpoint.saver import CheckpointError, Saver
from dsvl_train.training.checkpoint.state import TrainState, load

__all__ = ["CheckpointError", "Saver", "TrainState", "load", "prepare_resume"]
