"""From bytes in a shard to tensors."""
