"""The search for loss weights and learning rates with Ray Tune; every trial is a Ray Train run."""
