"""The tasks of fine-tuning, one file each."""
