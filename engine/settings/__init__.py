"""Settings: one declaration gives the field of a dataclass, its TOML key, its flag, its help and its printed value."""
