"""Raw datasets to shards to plan to micro-batches. Imports no Megatron."""
