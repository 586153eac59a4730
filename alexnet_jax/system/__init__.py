"""Files, signals, command lines and the machine. Nothing in here imports JAX."""
