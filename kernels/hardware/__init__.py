"""The device, its peaks, and timing."""
