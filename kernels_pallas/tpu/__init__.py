"""Kernels for Cloud TPU, in Pallas' Mosaic TPU dialect."""
