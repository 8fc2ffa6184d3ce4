"""Tokenizers, the detokenizer and chat templates."""
