"""Conversations as a chat template renders them: the template, its sandbox, where each turn is, and its tokens."""
