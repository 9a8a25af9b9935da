"""The machinery of ops: contracts, dispatch to backends, autograd, library ops."""
