"""Imported once by the process that ranks of the tests are forked from: what each of them would import by itself, for seconds."""

from dsvl_train.parallel import cpu_backend

cpu_backend.install()

import dsvl_train.training.run  # noqa: E402
import dsvl_train.training.setup  # noqa: E402
import dsvl_train.training.trainer  # noqa: E402, F401
