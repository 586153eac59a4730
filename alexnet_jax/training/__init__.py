"""From a config to a trained network: steps, meshes, loop, checkpoints, evaluation."""
