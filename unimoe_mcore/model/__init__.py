"""The model: towers, connectors, language model, experts."""
