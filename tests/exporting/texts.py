"""What a tokenizer of these tests is trained on."""

WORDS = ["What is the capital of France? It is the red one, and the 2nd of three. " * 3]
VOCABULARY = 320
"""A multiple of 64: an import adds no rows."""
