"""Op contracts and their backends. Nothing is imported here: Hugging Face's package of the same name may find this folder first."""
