"""The networks: tables, ablations, the Flax module, operators, weights."""
