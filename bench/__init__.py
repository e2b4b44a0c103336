"""Performance reports: `make bench`, `make bench-gpu`, `make bench-compare`, `make gpu-check`.

A figure here has a correctness gate before it, a peer beside it and a measured ceiling under it. Read `runner.py`
first: it is how one case is measured.
"""
