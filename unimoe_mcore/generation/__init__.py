"""Answers of a trained run to a question with any mix of media, token by token."""
