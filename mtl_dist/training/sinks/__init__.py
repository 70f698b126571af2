"""Where else a run is seen: TensorBoard's files, and servers such as MLflow's and W&B's. metrics.jsonl is the truth."""
