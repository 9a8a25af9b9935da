"""Reading and writing checkpoints of this and other libraries."""
