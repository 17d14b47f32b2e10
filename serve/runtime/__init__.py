"""Inference: batching, engines and backends."""
