"""What the language-model examples share: data, model, checkpoints, report."""
