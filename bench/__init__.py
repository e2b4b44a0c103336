"""Performance reports: `make bench`, `make bench-gpu`, `make bench-compare`, `make gpu-check`.

Every figure passes a correctness gate first and is reported with a peer and a measured ceiling. Read `runner.py` first:
it shows how one case is measured.
"""
