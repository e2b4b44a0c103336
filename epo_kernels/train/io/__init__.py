"""A run's input and output: checkpoints, metrics, the report, signals and streams."""
