"""Serving with NVIDIA Triton Inference Server: the model repository, and what starts and watches a server."""
