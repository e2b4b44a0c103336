"""The driver: `python -m epo_kernels.train`."""
