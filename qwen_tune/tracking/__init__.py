"""Trackers beside metrics.jsonl: W&B, TensorBoard, trackio and MLflow."""
