"""The tests, and the makers of tiny models and videos that they share (`from tests.tiny import ...`)."""
