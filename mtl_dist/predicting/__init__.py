"""What weights say of frames: evaluation, predictions, the members of an ensemble."""
