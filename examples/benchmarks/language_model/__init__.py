"""A language model in several runtimes, each in a process of its own; see ``../llm.py``."""
