"""Rows to token ids: templates, the model's chat template, the tokenizer, the length policy."""
