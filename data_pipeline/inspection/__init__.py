"""What ``python -m data_pipeline.inspect`` finds out, and how it shows it."""
