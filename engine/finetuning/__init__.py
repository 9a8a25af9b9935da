"""Fine-tuning: a checkpoint is adapted to a task, with the examples of a file of JSON lines."""
