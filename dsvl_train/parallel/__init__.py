"""Megatron-core start-up on CUDA and on the CPU."""
