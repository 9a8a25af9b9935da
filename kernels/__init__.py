"""Op contracts and their backends. No imports: Hugging Face's package of this name may find this folder first."""
