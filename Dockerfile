# An image with this package and all that training, evaluation, the demo and sweeps need.
#
#   docker build -t dsvl .                                  for GPUs, on NVIDIA's PyTorch with its flash-attn and Transformer Engine
#   docker build -t dsvl:cpu --build-arg VARIANT=cpu .      for CPUs
#
#   docker run --rm --gpus all --ipc host -v /data:/data -v "$PWD/runs:/opt/dsvl_train/runs" --user "$(id -u):$(id -g)" -e HOME=/tmp \
#       dsvl python train.py recipe=deepseek_vl2_tiny/align data.root=/data launch.nproc=8
#   docker run --rm dsvl:cpu dsvl plan recipe=demo_vl2/pretrain
#
# VARIANT      gpu or cpu
# TORCH_INDEX  for VARIANT=cpu: PyTorch's index of CPU builds, a smaller download than the CUDA build that pip finds by itself on x86
# EXTRAS       extras of pyproject.toml, with commas between them; constraints.txt pins what these need
ARG VARIANT=gpu

# torch 2.10.0a0, Python 3.12, CUDA 13.1
FROM nvcr.io/nvidia/pytorch:25.12-py3 AS gpu

FROM python:3.11.14-slim-bookworm AS cpu
ARG TORCH_INDEX
# Alone, since PyTorch's index has no other package in the versions of constraints.txt; what torch requires comes with the rest.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0

FROM ${VARIANT}
ARG EXTRAS=demo,eval,slurm
ENV PIP_ROOT_USER_ACTION=ignore \
    PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /opt/dsvl_train

# What the image brings stays as it is (docker/install.py), and is not installed anew when only the code changes.
COPY pyproject.toml constraints.txt ./
COPY docker/install.py docker/
RUN --mount=type=cache,target=/root/.cache/pip \
    python docker/install.py "${EXTRAS}"

COPY . .
# The image's constraints may hold back setuptools, with which this package is built; nothing else is installed here.
RUN --mount=type=cache,target=/root/.cache/pip \
    PIP_CONSTRAINT="" pip install --no-deps -e . \
    && dsvl plan recipe=demo_vl2/pretrain engine.device=cpu > /dev/null \
    && groupadd --gid 10001 dsvl \
    && useradd --create-home --uid 10001 --gid 10001 dsvl \
    && install -d -o dsvl -g dsvl -m 1777 runs outputs multirun

USER 10001:10001
CMD ["dsvl", "--help"]
