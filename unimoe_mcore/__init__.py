"""Uni-MoE on Megatron-Core: the training system."""
