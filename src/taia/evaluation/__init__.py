"""Evaluation: variants of one model on one set of examples, and paired statistics."""
