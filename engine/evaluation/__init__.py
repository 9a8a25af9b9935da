"""Log-probabilities of given texts and zero-shot tasks."""
