"""The export of a model: safetensors, ONNX, and a card."""
