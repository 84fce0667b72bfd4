"""What the command line's trainer needs: models, data, optimizers, the loop, checkpoints."""
