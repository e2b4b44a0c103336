"""`--plan`: the memory of each GPU and the work of a step under a run's settings, before anything is loaded."""
