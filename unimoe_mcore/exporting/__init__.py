"""A run's model for others: in the forms of transformers, PEFT, and Uni-MoE's own files."""
