"""What a run reads and writes: checkpoints, metrics, the report, signals and streams."""
