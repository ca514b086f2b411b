"""Attention for NVIDIA Hopper GPUs and newer, in Pallas with Mosaic GPU."""
