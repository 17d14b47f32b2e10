"""The model at work: batching, engines and backends."""
