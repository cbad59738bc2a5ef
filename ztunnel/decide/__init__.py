"""Answers: pure functions of (question, state)."""
