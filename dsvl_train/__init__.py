"""dsvl_train: train DeepSeek-VL and DeepSeek-VL2 style vision-language models, from a laptop CPU to a cluster."""

__version__ = "0.1.0"
