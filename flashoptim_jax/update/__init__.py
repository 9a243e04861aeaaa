"""What every flash optimizer does with gradients, state and parameters. Not public."""
